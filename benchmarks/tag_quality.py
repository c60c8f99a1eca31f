"""What [zh] tags and the normalisation of what they mark do to pictures and their texts, on the demo.

To be imported when the host can be (`host.enter`).
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from zimage_turbo.demo.evaluate import summarise, to_bytes
from zimage_turbo.demo.judge import Verdict
from zimage_turbo.engine import ode, prompts, sampling

from . import interval, studio
from .studio import Job, Source
from .wordings import CELLS, Cell, Said

Drawn = tuple[int, Verdict, np.ndarray | None]


@torch.inference_mode()
def encoded(said: Iterable[Said], source: Source) -> tuple[list[Job], list[dict[Cell, int]]]:
    """Jobs, and for every scene the number of the job of each cell: cells whose prompts become the same one share it,
    for they get the same picture."""
    clip = studio.pipeline(source).clip
    jobs, numbers = [], []
    for scene in said:
        known: dict[tuple[str, ...], int] = {}
        numbers.append({})
        for cell, text in scene.texts.items():
            (positive,), report = prompts.encode(clip, text, cell.spans)
            if report.sent not in known:
                known[report.sent] = len(jobs)
                states = positive[0].float().cpu().numpy()
                size = scene.scene.width, scene.scene.height
                jobs.append(Job(len(jobs), text, scene.seed, *size, states, scene.scene))
            numbers[-1][cell] = known[report.sent]
    return jobs, numbers


@torch.inference_mode()
def draw(batch: list[Job], source: Source, shown: frozenset[int]) -> list[Drawn]:
    """The number of each job, what was right, and the picture [height, width, 3] in 8 bits if it is shown."""
    drawing = studio.pipeline(source)
    latent, _ = studio.latents(drawing, batch, sampling.sampler(ode.OFFICIAL, ode.TOLERANCE), ode.sigmas())
    return [
        (job.number, studio.judged(picture, job.said), to_bytes(picture) if job.number in shown else None)
        for job, picture in zip(batch, studio.pictures(drawing, latent), strict=True)
    ]


def summary(said: list[Said], numbers: list[dict[Cell, int]], verdicts: dict[int, Verdict]) -> Iterator[dict]:
    """A row a cell. `against_untagged`: on how many scenes the prompt becomes the same, and on how many only one of the
    two is wholly right."""
    for cell in CELLS:
        own = [verdicts[row[cell]] for row in numbers]
        row = {
            "name": cell.name, "wording": cell.wording, "tagged": cell.tagged,
            "spans": cell.spans if cell.tagged else None, "example": said[0].texts[cell],
            "scores": interval.rates(summarise(own)),
        }  # fmt: skip
        if cell.tagged:
            plain = Cell(cell.wording, False)
            others = [verdicts[each[plain]] for each in numbers]
            pairs = [(ours.all_right, other.all_right) for ours, other in zip(own, others, strict=True)]
            row["against_untagged"] = {
                "same_prompt": sum(each[cell] == each[plain] for each in numbers),
                "only_tagged_right": pairs.count((True, False)),
                "only_untagged_right": pairs.count((False, True)),
            }
        yield row


def line(row: dict) -> str:
    """For the terminal."""
    rates = "".join(
        f"  {name} {100 * found['rate']:.1f} % [{100 * found['interval'][0]:.1f}, {100 * found['interval'][1]:.1f}]"
        for name, found in row["scores"].items()
        if name in ("items", "characters", "pictures")
    )
    return f"{row['name']:<48}{rates}"
