"""Where an exact solver would end: many steps with the state in fp64, kept on disk.

On the demo the model is evaluated in fp64 too, by the modules that it was trained with: kernels take no fp64. What
they have as fp32 constants (rotary tables, frequencies of the timestep) is the same there. Another checkpoint is
evaluated as it was loaded.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import comfy.samplers
import numpy as np
import torch

from zimage_turbo.demo.checkpoint import load_part
from zimage_turbo.demo.configs import PAD_MULTIPLE
from zimage_turbo.engine import adams, ode

from . import studio, weight_files
from .contestants import FILES
from .studio import Job, Source

DEMO = Path(__file__).resolve().parent.parent / "demo"
VERSION = 1  # of what is kept: counts up when the same job would give another latent
Velocity = Callable[[torch.Tensor, float], torch.Tensor]


def latents(batch: list[Job], source: Source, steps: int, folder: Path) -> torch.Tensor:
    """[batch, 16, h, w] fp64 at the end of the ODE, as the model has them, where it computes."""
    files = [folder / f"{_key(job, source, steps)}.npy" for job in batch]
    if not all(file.exists() for file in files):
        solved = _solved(batch, source, steps).cpu().numpy()
        folder.mkdir(parents=True, exist_ok=True)
        for file, latent in zip(files, solved, strict=True):
            unfinished = file.with_suffix(".part")
            with unfinished.open("wb") as opened:
                np.save(opened, latent)
            unfinished.replace(file)
    device = studio.pipeline(source).model.load_device
    return torch.from_numpy(np.stack([np.load(file) for file in files])).to(device)


def described(source: Source, steps: int) -> dict:
    model = "fp64" if source.models is None else f"as loaded, {source.precision}"
    return {"steps": steps, "method": "Adams-Bashforth 4", "state": "fp64", "model": model}


def bashforth(velocity: Velocity, x: torch.Tensor, levels: list[float]) -> torch.Tensor:
    """The Adams-Bashforth formula of up to four velocities, fewer at the start; x [batch, …] fp64."""
    found: list[adams.Point] = []
    for level, after in itertools.pairwise(levels):
        found = [(level, velocity(x, level)), *found][:4]
        x = x + adams.integral(found, level, after)
    return x


def _solved(batch: list[Job], source: Source, steps: int) -> torch.Tensor:
    levels = ode.sigmas(steps)
    if source.models is None:
        device = studio.pipeline(source).model.load_device
        start = studio.noise(batch).to(device, torch.float64) * float(levels[0])
        return bashforth(_demo_velocity(batch, device), start, levels.double().tolist())
    ended = []

    def run(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def velocity(x: torch.Tensor, level: float) -> torch.Tensor:
            current = x.float()
            clean = model(current, current.new_full([len(x)], level), **extra_args)
            return (x - clean.double()) / level

        ended.append(bashforth(velocity, x.double(), sigmas.double().tolist()))
        return ended[-1].float()

    studio.latents(studio.pipeline(source), batch, comfy.samplers.KSAMPLER(run), levels)
    return ended[0]


class _Exact(torch.Tensor):
    """Stays fp64 where the demo's modules ask for fp32."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is torch.Tensor.float:
            return arguments[0]
        return super().__torch_function__(function, types, arguments, options or {})


@functools.lru_cache(maxsize=1)
def _denoiser(device: torch.device) -> torch.nn.Module:
    return load_part(DEMO, "transformer").double().to(device)


def _demo_velocity(batch: list[Job], device: torch.device) -> Velocity:
    context = studio.states(batch).to(device, torch.float64)
    tokens = context.shape[1]
    context = torch.nn.functional.pad(context, (0, 0, 0, -tokens % PAD_MULTIPLE))
    lengths = torch.full([len(batch)], tokens, device=device)
    model = _denoiser(device)

    def velocity(x: torch.Tensor, level: float) -> torch.Tensor:
        sigma = x.new_full([len(x)], level)
        return model(x.as_subclass(_Exact), sigma.as_subclass(_Exact), context, lengths).as_subclass(torch.Tensor)

    return velocity


def _key(job: Job, source: Source, steps: int) -> str:
    """Of everything that the latent depends on."""
    if source.models is None:
        (file,) = (DEMO / "transformer").glob("*.safetensors")
    else:
        file = source.models / FILES[0] / weight_files.names(source.models)[FILES[0]]
    about = file.stat()
    words = VERSION, steps, job.seed, job.width, job.height, source.precision, about.st_size, about.st_mtime_ns
    return hashlib.sha256(repr(words).encode() + job.states.tobytes()).hexdigest()
