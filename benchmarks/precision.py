"""What every precision and attention backend costs in quality: the demo through the pack's nodes against fp32.

For each: how many of the held-out prompts' items are right, and the PSNR of the pictures against those of fp32 with
exact attention, same prompts and seeds. What the device cannot run is listed with its reason.
Run: ZIMAGE_COMFYUI=<tree> python benchmarks/precision.py [--count 200] [--out benchmarks/results/precision.json]
"""

import argparse
import json
import sys
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
    parser.add_argument("--processes", type=int, default=2, help="processes that judge")
    parser.add_argument("--out", type=Path, default=PACK / "benchmarks" / "results" / "precision.json")
    arguments = parser.parse_args()
    host.enter(host.tree(), [])
    import torch

    with torch.inference_mode():
        report = measure(arguments)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(arguments: argparse.Namespace) -> dict:

    from zimage_turbo.demo.evaluate import score
    from zimage_turbo.demo.prompts import SETS
    from zimage_turbo.engine.model import ATTENTIONS, PRECISIONS
    from zimage_turbo.tests.drawing import node_draw

    prompts, pictures = SETS["full"](arguments.count), {}

    def draw_with(precision: str, attention: str):
        draw = node_draw(precision, attention)

        def kept(texts, seeds, sizes):
            pictures[precision, attention] = draw(texts, seeds, sizes)
            return pictures[precision, attention]

        return kept

    report = {
        **conditions(),
        "prompts": arguments.count,
        "rows": [],
    }
    choices = [REFERENCE, *((precision, "auto") for precision in PRECISIONS[1:])]
    choices += [("bf16", attention) for attention in ATTENTIONS[1:]]
    for precision, attention in choices:
        row = {"precision": precision, "attention": attention}
        try:
            scores, _ = score(draw_with(precision, attention), prompts, arguments.processes)
        except ValueError as reason:  # the loader says what the device lacks
            row["not_run"] = str(reason)
        else:
            row |= {"psnr_db": psnr(pictures[precision, attention], pictures[REFERENCE]), "scores": scores}
        report["rows"].append(row)
        shown = {name: value["rate"] for name, value in row.get("scores", {}).items()}
        print(precision, attention, row.get("not_run") or f"{row['psnr_db']} dB", shown, flush=True)
    return report


def psnr(pictures: list, reference: list) -> float | None:
    """Mean over the pictures in dB, values in 0..1; None if all are equal to the bit."""
    import torch

    errors = [(ours - exact).square().mean() for ours, exact in zip(pictures, reference, strict=True)]
    decibels = [-10 * error.log10() for error in errors if error > 0]
    return round(torch.stack(decibels).mean().item(), 2) if decibels else None


if __name__ == "__main__":
    main()
