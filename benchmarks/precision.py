"""What every precision and attention backend costs in quality: the demo through the pack's nodes against fp32.

For each: how many of the held-out prompts' items are right, and the PSNR of the pictures against those of fp32 with
exact attention, same prompts and seeds. What the device cannot run is listed with its reason.
Run: ZIMAGE_COMFYUI=<tree> python benchmarks/precision.py [--count 200] [--out benchmarks/results/precision.json]
"""

import argparse
import json
import os
import sys
import time
import types
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks.conditions import conditions  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402

REFERENCE = ("fp32", "sdpa")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="fully stated prompts of 256x256")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="processes that judge")
    parser.add_argument("--out", type=Path, default=PACK / "benchmarks" / "results" / "precision.json")
    arguments = parser.parse_args()
    host.enter(host.tree(), [])
    import torch

    with torch.inference_mode():
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """The distance of every choice as it is drawn; the scores of all at the end, by one set of processes."""
    from zimage_turbo.demo.evaluate import score, summarise
    from zimage_turbo.demo.prompts import SETS
    from zimage_turbo.engine.model import ATTENTIONS, PRECISIONS

    prompts = SETS["full"](arguments.count)
    report = {**conditions(), "prompts": arguments.count, "rows": []}
    choices = [REFERENCE, *((precision, "auto") for precision in PRECISIONS[1:])]
    choices += [("bf16", attention) for attention in ATTENTIONS[1:]]
    drawn = []
    for precision, attention in choices:
        row = {"precision": precision, "attention": attention}
        report["rows"].append(row)
        started = time.perf_counter()
        try:
            pictures = draw(precision, attention, prompts)
        except ValueError as reason:  # the loader says what the device lacks
            row["not_run"] = str(reason)
        else:
            drawn.append((row, pictures))
            row |= {"psnr_db": psnr(pictures, drawn[0][1]), "seconds": round(time.perf_counter() - started, 1)}
        print(json.dumps(row), flush=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    every = [picture for _, pictures in drawn for picture in pictures]
    _, verdicts = score(lambda *_: every, prompts * len(drawn), arguments.processes)
    for index, (row, _) in enumerate(drawn):
        row["scores"] = summarise(verdicts[index * len(prompts) : (index + 1) * len(prompts)])
        rates = ", ".join(f"{name} {100 * value['rate']:.1f} %" for name, value in row["scores"].items())
        print(f"{row['precision']:<10}{row['attention']:<14}{row['psnr_db'] or 'equal':>8} dB  {rates}", flush=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def draw(precision: str, attention: str, prompts: list) -> list["torch.Tensor"]:  # noqa: F821
    """One picture a prompt, [height, width, 3] in 0..1."""
    from zimage_turbo.tests.drawing import node_draw

    sizes = [(prompt.said.width, prompt.said.height) for prompt in prompts]
    return node_draw(precision, attention)([p.text for p in prompts], [p.seed for p in prompts], sizes)


def psnr(pictures: list, reference: list) -> float | None:
    """Mean over the pictures in dB, values in 0..1; None if all are equal to the bit."""
    import torch

    errors = [(ours - exact).square().mean() for ours, exact in zip(pictures, reference, strict=True)]
    decibels = [-10 * error.log10() for error in errors if error > 0]
    return round(torch.stack(decibels).mean().item(), 2) if decibels else None


if __name__ == "__main__":
    main()
