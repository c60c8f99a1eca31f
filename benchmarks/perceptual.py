"""Measures of pictures that are reported where their packages are installed: LPIPS and ImageReward.

Both load networks of their own, which their packages fetch at first use.
"""

import functools
import importlib.util

import torch
from PIL import Image

from zimage_turbo.demo.evaluate import to_bytes

PACKAGES = {"lpips": "lpips", "image_reward": "ImageReward"}
INSTALL = {"lpips": "lpips", "image_reward": "image-reward"}
REWARD = "ImageReward-v1.0"


def available() -> list[str]:
    """The measures, of PACKAGES, whose package is there."""
    return [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]


def missing() -> dict[str, str]:
    """Why each of the others is not reported."""
    return {
        name: f"the package {package} is not installed. python -m pip install {INSTALL[name]}"
        for name, package in PACKAGES.items()
        if name not in available()
    }


def measured(picture: torch.Tensor, reference: torch.Tensor, text: str) -> dict[str, float]:
    """Of a picture [height, width, 3] in 0..1: its distance from the reference, 0 for the same (LPIPS, AlexNet), and
    how well people would find that it shows the prompt, about -2 to 2 (ImageReward)."""
    found = {}
    for name in available():
        found[name] = _distance(picture, reference) if name == "lpips" else _reward(picture, text)
    return found


@functools.lru_cache(maxsize=1)
def _network() -> torch.nn.Module:
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).eval()


def _distance(picture: torch.Tensor, reference: torch.Tensor) -> float:
    both = torch.stack((picture, reference)).permute(0, 3, 1, 2) * 2 - 1
    return float(_network()(both[:1], both[1:]))


@functools.lru_cache(maxsize=1)
def _judge():
    import ImageReward

    return ImageReward.load(REWARD)


def _reward(picture: torch.Tensor, text: str) -> float:
    return float(_judge().score(text, Image.fromarray(to_bytes(picture))))
