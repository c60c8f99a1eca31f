"""Pictures of many prompts, drawn in batches through the host's guider, by one process or several.

To be imported when the host can be (`host.enter`).
"""

import concurrent.futures
import functools
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import comfy.sample
import comfy.samplers
import numpy as np
import torch

from zimage_turbo.demo.evaluate import to_bytes
from zimage_turbo.demo.judge import Verdict, judge
from zimage_turbo.demo.world import Scene
from zimage_turbo.engine.model import LATENT_SCALE
from zimage_turbo.launcher.inside import host

from . import weight_files
from .contestants import FILES
from .pipeline import Pipeline, register


@dataclass(frozen=True)
class Source:
    """Which checkpoint draws: that of a models folder, or the demo; precision as the loader takes it."""

    models: Path | None
    precision: str


@dataclass(frozen=True, eq=False)
class Job:
    """A picture to be drawn. states [1, tokens, width] fp32: its prompt, encoded; said: what it is judged by."""

    number: int
    text: str
    seed: int
    width: int
    height: int
    states: np.ndarray
    said: Scene | None


class Counted(comfy.samplers.CFGGuider):
    """Counts the evaluations that a sampler makes."""

    evaluations = 0

    def predict_noise(self, *arguments, **options):
        self.evaluations += 1
        return super().predict_noise(*arguments, **options)


@functools.lru_cache(maxsize=1)
def pipeline(source: Source) -> Pipeline:
    """Loaded once a process."""
    if source.models is None:
        return Pipeline({}, source.precision, cache=False)
    register(source.models, FILES)
    return Pipeline(weight_files.names(source.models), source.precision, cache=False)


def batches(jobs: Iterable[Job], most: int) -> list[list[Job]]:
    """Jobs of one size and as many tokens can be one batch: nothing is padded that would not be at batch 1."""

    def shape(job: Job) -> tuple:
        return job.states.shape, job.width, job.height

    groups = (list(group) for _, group in itertools.groupby(sorted(jobs, key=shape), shape))
    return [group[start : start + most] for group in groups for start in range(0, len(group), most)]


def noise(batch: list[Job]) -> torch.Tensor:
    """[batch, 16, height / 8, width / 8] fp32: of each job what it would get alone."""
    rows = [
        comfy.sample.prepare_noise(torch.zeros(1, 16, job.height // LATENT_SCALE, job.width // LATENT_SCALE), job.seed)
        for job in batch
    ]
    return torch.cat(rows)


def states(batch: list[Job]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([job.states for job in batch]))


def latents(
    drawing: Pipeline, batch: list[Job], sampler: comfy.samplers.KSAMPLER, levels: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """[batch, 16, h, w] fp32 as the model has them, where it computes, and how many evaluations were made.

    The sampler gets levels of its own: the host's uni_pc writes into those that it is given.
    """
    guider, start = Counted(drawing.model), noise(batch)
    guider.inner_set_conds({"positive": [[states(batch), {}]]})
    guider.set_cfg(1.0)
    empty, own = torch.zeros_like(start), levels.clone()
    drawn = guider.sample(start, empty, sampler, own, disable_pbar=True, seed=batch[0].seed)
    return drawing.model.model.process_latent_in(drawn.to(drawing.model.load_device)), guider.evaluations


def pictures(drawing: Pipeline, latent: torch.Tensor) -> list[torch.Tensor]:
    """One [height, width, 3] in 0..1 for each, on the CPU."""
    decoded = drawing.decode({"samples": drawing.model.model.process_latent_out(latent.float())})
    return list(decoded.float().cpu().clamp(0, 1))


def judged(picture: torch.Tensor, said: Scene) -> Verdict:
    """Rounded to 8 bits, as in a saved file."""
    return judge(torch.from_numpy(to_bytes(picture)).float() / 255, said)


def each(function: Callable, tasks: list, processes: int, threads: int) -> Iterator:
    """function(task) of every task as they finish; with one process, by this one."""
    if processes == 1:
        yield from map(function, tasks)
        return
    spawn = multiprocessing.get_context("spawn")  # a process that forks from one with a CUDA context has none
    with concurrent.futures.ProcessPoolExecutor(processes, spawn, host.enter, (host.tree(), [])) as pool:
        for future in concurrent.futures.as_completed([pool.submit(_call, function, task, threads) for task in tasks]):
            yield future.result()


def _call(function: Callable, task: object, threads: int) -> object:
    torch.set_num_threads(threads)
    return function(task)
