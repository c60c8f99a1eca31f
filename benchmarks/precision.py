"""What every precision and attention backend costs in quality: the demo through the pack's nodes against fp32.

For each: how many of the held-out prompts' items are right, and the PSNR of the pictures against those of fp32 with
exact attention, same prompts and seeds. Each row says by which attention backend its evaluations ran, also where 'auto'
chose it, and on which path. What the device cannot run is listed with its reason.
The exit status is 1 if an INT4 precision draws more than two points fewer of the items right than fp32.
Run: ZIMAGE_COMFYUI=<tree> python benchmarks/precision.py [--count 200] [--out benchmarks/results/precision.json]
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks.conditions import conditions  # noqa: E402
from zimage_turbo.benchmarks.pipeline import Pipeline  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402

REFERENCE = ("fp32", "sdpa")
EXACT_AND_FP8 = ("hopper", "cudnn", "hopper-fp8", "triton-fp8")
QUANTISED_ATTENTION = [(precision, name) for precision in ("fp8", "int4-fp8") for name in EXACT_AND_FP8]
MOST_LOST = 2.0  # points of the items' rate
SPAWN = multiprocessing.get_context("spawn")  # a process that forks from one with a CUDA context has none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="fully stated prompts of 256x256")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="processes that judge")
    parser.add_argument("--drawing", type=int, default=1, help="processes that draw, each one choice after another")
    parser.add_argument("--out", type=Path, default=PACK / "benchmarks" / "results" / "precision.json")
    arguments = parser.parse_args()
    host.enter(host.tree(), [])
    import torch

    with torch.inference_mode():
        report = measure(arguments)
    losses = int4_losses(report["rows"])
    for name, lost in losses.items():
        print(f"{name}: {lost:+.2f} points of drawing accuracy lost against fp32, at most {MOST_LOST:g} allowed")
    if not losses or max(losses.values()) > MOST_LOST:
        sys.exit("INT4 loses more than it may." if losses else "No INT4 precision was drawn.")


def int4_losses(rows: list[dict]) -> dict[str, float]:
    """Points of the items' rate that every INT4 row lies below the first, the reference; negative where above."""
    best = rows[0]["scores"]["items"]["rate"]
    return {
        f"{row['precision']}, {row['attention']}": round(100 * (best - row["scores"]["items"]["rate"]), 2)
        for row in rows
        if row["precision"].startswith("int4") and "scores" in row
    }


def measure(arguments: argparse.Namespace) -> dict:
    """The distance of every choice when it is drawn, its scores when it is judged; others are drawn meanwhile."""
    from zimage_turbo.demo.evaluate import judge_one, summarise, to_bytes
    from zimage_turbo.demo.prompts import SETS
    from zimage_turbo.engine.model import ATTENTIONS, PRECISIONS

    prompts = SETS["full"](arguments.count)
    report = {**conditions(), "prompts": arguments.count, "rows": []}
    choices = [REFERENCE, *((precision, "auto") for precision in PRECISIONS[1:])]
    choices += [("bf16", attention) for attention in ATTENTIONS[1:]] + QUANTISED_ATTENTION
    reference, judging = None, []

    def settle(row: dict, verdicts: list[concurrent.futures.Future]) -> None:
        row["scores"] = summarise([each.result() for each in verdicts])
        rates = ", ".join(f"{name} {100 * value['rate']:.1f} %" for name, value in row["scores"].items())
        how = f"{row['precision']:<10}{row['attention']:<14}{row['backend'] or 'the host':<14}"
        print(f"{how}{row['psnr_db'] or 'equal':>8} dB  {rates}", flush=True)

    def write() -> None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    with concurrent.futures.ProcessPoolExecutor(arguments.processes, SPAWN) as judges:
        for row, pictures in drawings(choices, prompts, arguments.drawing):
            report["rows"].append(row)
            if pictures is not None:
                reference = reference or pictures
                row["psnr_db"] = psnr(pictures, reference)
                jobs = zip(map(to_bytes, pictures), prompts, strict=True)
                judging.append((row, [judges.submit(judge_one, *job) for job in jobs]))
            print(json.dumps(row), flush=True)
            while judging and all(each.done() for each in judging[0][1]):
                settle(*judging.pop(0))
            write()
        for row, verdicts in judging:
            settle(row, verdicts)
            write()
    return report


def drawings(choices: list[tuple[str, str]], prompts: list, processes: int) -> Iterator[tuple[dict, list | None]]:
    """In the order of the choices, the row of each and its pictures; None for what the device cannot run."""
    import torch

    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(processes, SPAWN, host.enter, (host.tree(), [])) as pool,
    ):
        files = [Path(folder) / f"{number}.pt" for number in range(len(choices))]
        rows = pool.map(draw, choices, [prompts] * len(choices), files)
        for row, file in zip(rows, files, strict=True):
            yield row, torch.load(file, weights_only=True) if file.exists() else None


def draw(choice: tuple[str, str], prompts: list, file: Path) -> dict:
    """Write one picture a prompt, [height, width, 3] in 0..1; how the denoiser ran, or why it could not."""
    import torch

    precision, attention = choice
    row, started = {"precision": precision, "attention": attention}, time.perf_counter()
    with torch.inference_mode():
        try:
            pipeline = Pipeline({}, precision, cache=False, attention=attention)
            pictures = []
            for prompt in prompts:
                positive = pipeline.encode(prompt.text)
                latent = pipeline.sample(positive, prompt.seed, prompt.said.width, prompt.said.height)
                pictures.append(pipeline.decode(latent)[0].float().cpu())
        except ValueError as reason:  # the loader says what the device lacks
            return row | {"not_run": str(reason)}
        row |= path_of(pipeline.model)
        pipeline.close()
    torch.save(pictures, file)
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def path_of(patcher) -> dict:
    """`forwards`: evaluations by path; `backend`: that of their attention, None where the host's forward took part."""
    import torch

    from zimage_turbo.engine import turbo

    module = patcher.model.diffusion_model
    latent = torch.empty(0, device=patcher.load_device, dtype=patcher.model.get_dtype_inference())
    ours = set(module.forwards) <= {turbo.FAST, turbo.REPLAYED}
    return {"backend": module.compute(latent).attention if ours else None, "forwards": dict(module.forwards)}


def psnr(pictures: list, reference: list) -> float | None:
    """Mean over the pictures in dB, values in 0..1; None if all are equal to the bit."""
    import torch

    errors = [(ours - exact).square().mean() for ours, exact in zip(pictures, reference, strict=True)]
    decibels = [-10 * error.log10() for error in errors if error > 0]
    return round(torch.stack(decibels).mean().item(), 2) if decibels else None


if __name__ == "__main__":
    main()
