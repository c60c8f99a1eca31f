"""Solvers beside the host's samplers at equal numbers of evaluations, against where an exact solver would end.

To be imported when the host can be (`host.enter`).
"""

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import comfy.samplers
import numpy as np
import torch

from zimage_turbo.demo.evaluate import summarise, to_bytes
from zimage_turbo.engine import ode, sampling

from . import interval, perceptual, reference, studio
from .studio import Job, Source

OURS, HOST = "ours", "host"
HOSTS = ("euler", "res_multistep", "uni_pc", "dpmpp_2m")
YARDSTICK = "ours implicit"
CHECKED = 4  # prompts whose reference is held against one of twice the steps


@dataclass(frozen=True)
class Way:
    """A solver with the levels that it is given, which are to take `budget` evaluations.

    steps: of the schedule; those of the host's KSampler for uni_pc are one more, without the last level but one.
    tolerance: of adaptive, which takes pictures one at a time: those of a batch would share their steps.
    """

    by: str
    solver: str
    budget: int
    steps: int
    tolerance: float | None = None
    discards: bool = False

    @property
    def name(self) -> str:
        more = f" {self.tolerance:g}" if self.tolerance is not None else ""
        more += " as in KSampler" if self.discards else ""
        return f"{self.by} {self.solver}{more}" + (f", {self.steps} steps" if self.solver == "heun" else "")

    def levels(self) -> torch.Tensor:
        levels = ode.sigmas(self.steps)
        return torch.cat((levels[:-2], levels[-1:])) if self.discards else levels

    def sampler(self) -> comfy.samplers.KSAMPLER:
        if self.by == HOST:
            return comfy.samplers.sampler_object(self.solver)
        return sampling.sampler(self.solver, ode.TOLERANCE if self.tolerance is None else self.tolerance)


def ways(budgets: list[int], tolerances: list[float]) -> list[Way]:
    """heun makes 2 k - 1 evaluations in k steps: at an even budget one less and one more are given."""
    every = []
    for budget in budgets:
        every += [Way(OURS, solver, budget, budget) for solver in (ode.OFFICIAL, "implicit")]
        every += [Way(OURS, "adaptive", budget, budget, tolerance) for tolerance in tolerances]
        every += [Way(HOST, solver, budget, budget) for solver in HOSTS]
        every.append(Way(HOST, "uni_pc", budget, budget + 1, discards=True))
        every += [Way(HOST, "heun", budget, steps) for steps in sorted({(budget + 1) // 2, budget // 2 + 1})]
    return every


@torch.inference_mode()
def measure(
    batch: list[Job], every: list[Way], source: Source, steps: int, folder: Path, shown: frozenset[int], budget: int
) -> list[dict]:
    """What came of each job: `rows`, in the order of the ways; `reference_error` for the first; `pictures` by name,
    the reference's first, of the jobs and the budget that are shown.
    """
    drawing = studio.pipeline(source)
    exact = reference.latents(batch, source, steps, folder)
    wanted = studio.pictures(drawing, exact)
    found = [{"number": job.number, "text": job.text, "rows": [], "pictures": {}} for job in batch]
    for job, picture, each in zip(batch, wanted, found, strict=True):
        if job.number in shown:
            each["pictures"]["reference"] = to_bytes(picture)
    _check(batch, exact, source, steps, folder, found)
    for way in every:
        drawn, evaluations = _drawn(drawing, batch, way)
        for index, picture in enumerate(studio.pictures(drawing, drawn)):
            job, each = batch[index], found[index]
            row = {
                "evaluations": evaluations[index],
                "error": relative(drawn[index].double(), exact[index]),
                "psnr_db": psnr(picture, wanted[index]),
                **perceptual.measured(picture, wanted[index], job.text),
            }
            each["rows"].append(row if job.said is None else row | {"verdict": studio.judged(picture, job.said)})
            if job.number in shown and way.budget == budget:
                each["pictures"][way.name] = to_bytes(picture)
    return found


def _drawn(drawing, batch: list[Job], way: Way) -> tuple[torch.Tensor, list[int]]:
    parts = [batch] if way.tolerance is None else [[job] for job in batch]
    drawn = [studio.latents(drawing, part, way.sampler(), way.levels()) for part in parts]
    evaluations = [count for part, (_, count) in zip(parts, drawn, strict=True) for _ in part]
    return torch.cat([latent for latent, _ in drawn]), evaluations


def _check(batch: list[Job], exact: torch.Tensor, source: Source, steps: int, folder: Path, found: list[dict]) -> None:
    """Notes how far the first jobs' references are from those of twice the steps."""
    checked = [index for index, job in enumerate(batch) if job.number < CHECKED]
    if checked:
        finer = reference.latents([batch[index] for index in checked], source, 2 * steps, folder)
        for index, latent in zip(checked, finer, strict=True):
            found[index]["reference_error"] = relative(exact[index], latent)


def relative(latent: torch.Tensor, exact: torch.Tensor) -> float:
    """The norm of their difference in that of the exact one."""
    return float((latent - exact).norm() / exact.norm())


def psnr(picture: torch.Tensor, wanted: torch.Tensor) -> float:
    """In dB of values in 0..1."""
    return -10 * math.log10(float((picture - wanted).square().mean()))


@torch.inference_mode()
def times(job: Job, every: list[Way], source: Source, runs: int) -> dict[str, float]:
    """Milliseconds an evaluation by a way's name, the sampler's own work included, at batch 1: the median of some runs
    after one that is not counted."""
    drawing = studio.pipeline(source)
    taken = {}
    for way in every:
        found = []
        for _ in range(1 + runs):
            started = time.perf_counter()
            drawn, evaluations = studio.latents(drawing, [job], way.sampler(), way.levels())
            drawn.sum().item()  # waits for the device
            found.append(1000 * (time.perf_counter() - started) / evaluations)
        taken[way.name] = round(float(np.median(found[1:])), 3)
    return taken


def summary(found: list[dict], every: list[Way]) -> Iterator[dict]:
    """A row a way, over the prompts that were measured."""
    columns = [[each["rows"][index] for each in found] for index in range(len(every))]
    errors = {(way.name, way.budget): [row["error"] for row in rows] for way, rows in zip(every, columns, strict=True)}
    for way, rows in zip(every, columns, strict=True):
        counts = Counter(row["evaluations"] for row in rows)
        own = errors[way.name, way.budget]
        said = {
            "by": way.by, "solver": way.solver, "name": way.name, "budget": way.budget, "tolerance": way.tolerance,
            "evaluations": float(np.mean(list(counts.elements()))),
            "evaluations_of_prompts": {str(count): counts[count] for count in sorted(counts)},
        }  # fmt: skip
        measures = [name for name in rows[0] if name not in ("evaluations", "verdict")]
        said |= {name: interval.mean([row[name] for row in rows]) for name in measures}
        said["against_implicit"] = interval.paired(own, errors[YARDSTICK, way.budget])
        said["against_official"] = interval.paired(own, errors[f"{OURS} {ode.OFFICIAL}", way.budget])
        if "verdict" in rows[0]:
            said["scores"] = interval.rates(summarise([row["verdict"] for row in rows]))
        yield said


def line(row: dict) -> str:
    """For the terminal."""
    error, against = row["error"], row["against_implicit"]
    scores = "".join(
        f"  {name} {100 * row['scores'][name]['rate']:.1f} %" for name in ("items", "characters")
        if name in row.get("scores", {})
    )  # fmt: skip
    return (
        f"{row['name']:<32}{row['budget']:>3}{row['evaluations']:>7.2f} evaluations  error {error['mean']:.4f} "
        f"[{error['interval'][0]:.4f}, {error['interval'][1]:.4f}]  {row['psnr_db']['mean']:.2f} dB  "
        f"implicit nearer on {100 * against['higher']:.0f} %{scores}"
    )
