"""What the GPU tests draw: latents of small random models, by themselves and with a LoRA.

As a program, the latents of a process that has drawn nothing else: python latents.py COMFYUI FILE OUT PRECISION…
"""

import sys
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent.parent
SIZES = [(256, 256), (192, 320), (512, 512), (208, 208)]  # the third has rows enough for fused gates

if __name__ == "__main__":
    import types

    package = types.ModuleType("zimage_turbo")
    package.__path__ = [str(PACK)]
    sys.modules["zimage_turbo"] = package
    from zimage_turbo.launcher.inside import host

    host.enter(Path(sys.argv[1]), [])

import comfy.sd  # noqa: E402
import torch  # noqa: E402

from zimage_turbo.engine import ode, sampling  # noqa: E402
from zimage_turbo.engine.model import load_model  # noqa: E402


def positive(seed: int) -> list:
    return [[torch.randn(1, 40, 256, generator=torch.Generator().manual_seed(seed)), {}]]


def draw(patcher, size: tuple[int, int], seed: int = 1) -> torch.Tensor:
    latent = sampling.empty_latent(patcher, *size, 1)
    return sampling.sample(patcher, positive(seed), latent, seed, ode.sigmas())["samples"].cpu()


def with_lora(patcher, linear: str = "layers.0.attention.out", outputs: int = 256):
    """A clone with one linear patched, which takes 256 values."""
    generator = torch.Generator().manual_seed(9)
    lora = {
        f"diffusion_model.{linear}.lora_{part}.weight": torch.randn(shape, generator=generator) * 0.1
        for part, shape in (("A", (4, 256)), ("B", (outputs, 4)))
    }
    return comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)[0]


def of_fresh_models(file: Path, precision: str) -> dict[str, list[torch.Tensor]]:
    """The latents of SIZES, each drawn by a model that was loaded for it."""
    return {
        "plain": [draw(load_model(file, precision), size) for size in SIZES],
        "lora": [draw(with_lora(load_model(file, precision)), size) for size in SIZES],
    }


if __name__ == "__main__":
    with torch.inference_mode():
        file, out, *precisions = sys.argv[2:]
        torch.save({precision: of_fresh_models(Path(file), precision) for precision in precisions}, out)
