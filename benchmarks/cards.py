"""A group of ranks as ComfyUI's process has it, asked without a server: what it draws, and how long that takes."""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from ..engine import ode, plan, spread
from ..engine.group.coordinator import Group
from ..engine.group.launch import DUTIES, Setup
from ..engine.model import LATENT_SCALE
from .timing import quantiles

LIMIT = 900.0  # seconds of a request
EXCHANGE = "benchmarks.group_exchange"


def setup(devices: tuple[str, ...]) -> Setup:
    return Setup(devices, operations=(DUTIES, EXCHANGE))


def image(seed: int, sides: tuple[int, int], positive: list) -> dict:
    """A request for a picture, the same for every seed. sides: height and width in pixels."""
    shape = 1, 16, *(side // LATENT_SCALE for side in sides)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return {"noise": noise, "latent": None, "mask": None, "seed": seed, "positive": positive}


class Cards:
    """The ranks of `group` by number, of which the first so many are asked. parts: the files of the models."""

    def __init__(self, group: Group, diffusion_model: Path, vae: Path):
        self.group, self.key = group, ""
        self.files = {"diffusion_model": str(diffusion_model), "vae": str(vae)}

    def load(self, precision: str) -> float:
        """Seconds until all ranks hold the models in this precision, in place of any others."""
        began = time.perf_counter()
        self.group.keep("model", "load", self._wanted(precision), LIMIT)
        self.key = precision
        return time.perf_counter() - began

    def load_first(self, precision: str) -> None:
        """Have the first rank alone hold the models, until `load`."""
        self.group.call("load", lambda ranks: {0: self._wanted(precision)}, LIMIT)
        self.key = precision

    def _wanted(self, precision: str) -> dict:
        return self.files | {"key": precision, "precision": precision, "attention": "auto", "cache": True}

    def meet(self, count: int) -> None:
        """Let the first so many draw pictures together."""
        request = {"islands": [list(range(count))], "size": count}
        if self.group.kept(f"meeting {count}") is None:
            self.group.keep(f"meeting {count}", "meet", request, LIMIT)

    def drawn(self, images: list[dict], count: int, split: str = plan.IMAGES, steps: int = ode.NFE) -> torch.Tensor:
        """Latents [B, 16, h, w] by the first `count` ranks: whole ones each, or (`plan.SEQUENCE`) each one together."""
        common = {"key": self.key, "sigmas": ode.sigmas(steps), "solver": ode.OFFICIAL, "tolerance": ode.TOLERANCE}
        results = spread.draw(self.group, common | {"previews": False}, images, LIMIT, choose=_of_first(count, split))
        return torch.cat([told["latent"] for told in results])

    def pictures(self, images: list[dict], count: int, split: str = plan.IMAGES) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents drawn so and pictures [B, H, W, 3] of them, as the sampler and the VAE of multi-gpu make them."""
        latents = self.drawn(images, count, split)
        return latents, decoded(self.group, self.key, latents, _of_first(count, plan.IMAGES))

    def evaluation(self, count: int, size: int, tokens: int) -> dict[int, float]:
        """Seconds of one evaluation by one rank and by `count` that have met: the slowest rank's."""
        request = self._alike(size, tokens) | {"sizes": [1, count], "islands": [list(range(count))]}
        told = self._asked("measure", count, request)
        return {each: max(seconds[str(each)] for seconds in told.values()) for each in (1, count)}

    def exchange(self, count: int, size: int, tokens: int) -> float:
        """Seconds of that evaluation's exchanges by themselves, the slowest rank's."""
        request = self._alike(size, tokens) | {"members": list(range(count))}
        return max(self._asked("exchange", count, request).values())

    def _alike(self, size: int, tokens: int) -> dict:
        return {"key": self.key, "shape": [1, 16, size // LATENT_SCALE, size // LATENT_SCALE], "tokens": tokens}

    def _asked(self, operation: str, count: int, request: dict) -> dict:
        return self.group.call(operation, lambda ranks: dict.fromkeys(range(count), request), LIMIT)

    def memory(self) -> list[int]:
        """MiB of each rank, as it last said: on a GPU what torch has reserved there."""
        return [rank["memory_mib"] for rank in self.group.document()["ranks"]]

    def kill(self) -> None:
        """End the last rank as the system would."""
        psutil.Process(self.group.document()["ranks"][-1]["pid"]).kill()


def decoded(group: Group, key: str, latents: torch.Tensor, choose: spread.Choose = spread.whole) -> torch.Tensor:
    """The pictures [B, H, W, 3] of latents [B, 16, h, w]."""
    shape = torch.Size((len(latents), *(LATENT_SCALE * side for side in latents.shape[2:]), 3))
    return spread.decode(group, key, latents, shape, torch.float32, LIMIT, choose=choose)


def _of_first(count: int, split: str) -> spread.Choose:
    return lambda left, _: plan.choose(left, [range(count)], split)


def times(run: Callable[[], object], most: int = 9, fewest: int = 3, seconds: float = 6.0) -> list[float]:
    """Seconds of calls, as many as `timing.milliseconds` makes, by the clock of whoever waits for what they give."""

    def once() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    first = once()
    return [once() for _ in range(min(most, max(fewest, int(seconds / first))))]


def spread_of(name: str, values: list[float]) -> dict:
    """The quantiles of what was timed, and all of it."""
    p20, p50, p80 = (round(value, 4) for value in quantiles(values))
    every = [round(value, 4) for value in values]
    return {f"{name}_p20_s": p20, f"{name}_p50_s": p50, f"{name}_p80_s": p80, f"{name}_times_s": every}
