"""What solvers and [zh] tags cost and gain in quality, with confidence intervals, plots and a gallery.

Run: ZIMAGE_COMFYUI=<tree> python benchmarks/quality.py solvers|tags [--count 500] [--processes 8] [--out RESULT.json]
solvers: ours and the host's samplers at equal numbers of evaluations against an exact solver, on held-out prompts of
the demo; with --models and --prompts on another checkpoint, whose pictures nobody judges, but LPIPS and ImageReward
measure them where they are installed. tags: English, Chinese and both with and without [zh] tags, and Chinese as it
gets typed, on the demo. Beside RESULT.json lie RESULT_gallery.png and, of solvers, RESULT_error.png and
RESULT_psnr.png, which `quality.py plots RESULT.json` draws anew. Plots need matplotlib.
"""

import argparse
import functools
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

from zimage_turbo.benchmarks import parts, plots  # noqa: E402
from zimage_turbo.benchmarks.conditions import conditions  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402

RESULTS = PACK / "benchmarks" / "results"
KEPT = PACK / ".runtime" / "quality_references"
PAUSE = 300  # seconds between reports on what was measured so far


def main() -> None:
    arguments = parse(sys.argv[1:])
    if arguments.what == "plots":
        for result in arguments.results:
            draw_plots(json.loads(result.read_text(encoding="utf-8")), result)
        return
    host.enter(host.tree(), [])
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    out = arguments.out or RESULTS / f"quality_{arguments.what}_{parts.suffix(gpu)}.json"
    with torch.inference_mode():
        (solvers if arguments.what == "solvers" else tags)(arguments, out)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--count", type=int, default=500, help="prompts, or for tags scenes")
    both.add_argument("--precision", default="fp32")
    both.add_argument("--batch", type=int, default=16, help="pictures drawn at once, where prompts are equally long")
    both.add_argument("--processes", type=int, default=1, help="processes that draw and judge; one cannot fill a GPU")
    both.add_argument("--out", type=Path, help="JSON file; by default in benchmarks/results, named after the device")
    solver = commands.add_parser("solvers", parents=[both], help="solvers and the host's samplers")
    solver.add_argument("--nfe", type=int, nargs="+", default=[4, 6, 8, 12, 20], help="evaluations, 2 or more")
    solver.add_argument("--tolerances", type=float, nargs="*", default=[0.02, 0.05, 0.1], help="of adaptive")
    solver.add_argument("--reference-steps", type=int, default=200)
    solver.add_argument("--references", type=Path, default=KEPT, help="folder that keeps references for the next run")
    solver.add_argument("--timed", type=int, default=5, help="runs of each solver that are timed")
    solver.add_argument("--shown", type=int, default=6, help="prompts in the gallery")
    solver.add_argument("--models", type=Path, help="folder of the official files, instead of the demo")
    solver.add_argument("--prompts", type=Path, help="with --models: a text file, one prompt a line")
    solver.add_argument("--size", type=int, default=1024, help="with --models: side of the pictures")
    tag = commands.add_parser("tags", parents=[both], help="[zh] tags and what they normalise, on the demo")
    tag.add_argument("--shown", type=int, default=4, help="scenes in the gallery")
    again = commands.add_parser("plots", help="draw the plots of results anew")
    again.add_argument("results", type=Path, nargs="+")
    arguments = parser.parse_args(words)
    if arguments.what == "solvers":
        if bool(arguments.models) != bool(arguments.prompts):
            parser.error("--models and --prompts go together: the demo's prompts say nothing to another model.")
        if min(arguments.nfe) < 2:
            parser.error(f"--nfe {min(arguments.nfe)}: uni_pc takes two steps or more.")
    return arguments


def solvers(arguments: argparse.Namespace, out: Path) -> None:
    from zimage_turbo.benchmarks import perceptual, reference, solver_quality, studio
    from zimage_turbo.engine import ode

    source = studio.Source(arguments.models and arguments.models.resolve(), arguments.precision)
    every = solver_quality.ways(arguments.nfe, arguments.tolerances)
    timed, fewest = min(arguments.nfe, key=lambda each: abs(each - ode.NFE)), min(arguments.nfe)
    jobs = encoded(prompts_of(arguments), source)
    batches = studio.batches(jobs, arguments.batch)
    report = {
        **conditions(), "weights": "official" if source.models else "demo", "precision": source.precision,
        "prompts": 0, "reference": reference.described(source, arguments.reference_steps),
        "not_reported": perceptual.missing(), "solvers": [],
    }  # fmt: skip
    for name, reason in report["not_reported"].items():
        print(f"{name} is not reported: {reason}", flush=True)
    measure = functools.partial(
        solver_quality.measure, every=every, source=source, steps=arguments.reference_steps,
        folder=arguments.references, shown=frozenset(range(arguments.shown)), budget=fewest,
    )  # fmt: skip
    found: list[dict] = []
    saved = time.monotonic()
    for measured in studio.each(measure, batches, arguments.processes, threads(arguments)):
        found += measured
        print(f"{len(found)} of {len(jobs)} prompts", flush=True)
        if time.monotonic() - saved > PAUSE or len(found) == len(jobs):
            report |= {"prompts": len(found), "solvers": list(solver_quality.summary(found, every))}
            save(report, out)
            saved = time.monotonic()
    found.sort(key=lambda each: each["number"])
    checked = [each["reference_error"] for each in found if "reference_error" in each]
    report["reference"] |= {"error": round(sum(checked) / len(checked), 7), "prompts_checked": len(checked)}
    beside = [way for way in every if way.budget == timed]
    report["ms_an_evaluation"] = solver_quality.times(jobs[0], beside, source, arguments.timed)
    rows = [each["pictures"] for each in found[: arguments.shown]]
    report["gallery"] = show(rows, [job.text for job in jobs], out) | {"nfe": fewest}
    save(report, out)
    print("\n".join(map(solver_quality.line, report["solvers"])), json.dumps(report["ms_an_evaluation"]), flush=True)
    draw_plots(report, out)


def tags(arguments: argparse.Namespace, out: Path) -> None:
    from zimage_turbo.benchmarks import studio, tag_quality, wordings
    from zimage_turbo.engine import ode

    source = studio.Source(None, arguments.precision)
    said = list(wordings.said(arguments.count))
    jobs, numbers = tag_quality.encoded(said, source)
    print(f"{len(jobs)} different pictures in {len(said)} scenes x {len(wordings.CELLS)} cells", flush=True)
    shown = {number for row in numbers[: arguments.shown] for number in row.values()}
    verdicts, pictures = {}, {}
    draw = functools.partial(tag_quality.draw, source=source, shown=frozenset(shown))
    for drawn in studio.each(draw, studio.batches(jobs, arguments.batch), arguments.processes, threads(arguments)):
        verdicts |= {number: verdict for number, verdict, _ in drawn}
        pictures |= {number: picture for number, _, picture in drawn if picture is not None}
        print(f"{len(verdicts)} of {len(jobs)} pictures", flush=True)
    report = {**conditions(), "weights": "demo", "precision": source.precision, "nfe": ode.NFE,
              "scenes": len(said), "pictures_drawn": len(jobs)}  # fmt: skip
    report["cells"] = list(tag_quality.summary(said, numbers, verdicts))
    print("\n".join(map(tag_quality.line, report["cells"])), flush=True)
    rows = [{cell.name: pictures[number] for cell, number in row.items()} for row in numbers[: arguments.shown]]
    report["gallery"] = show(rows, [next(iter(each.texts.values())) for each in said], out)
    save(report, out)


def prompts_of(arguments: argparse.Namespace) -> list:
    """(text, seed, width, height, what is said or None) of every prompt."""
    if arguments.prompts:
        lines = [line.strip() for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        side = arguments.size
        return [(line, seed, side, side, None) for seed, line in enumerate(lines[: arguments.count])]
    from zimage_turbo.demo.prompts import SETS

    return [
        (each.text, each.seed, each.said.width, each.said.height, each.said) for each in SETS["full"](arguments.count)
    ]


def encoded(prompts: list, source) -> list:
    from zimage_turbo.benchmarks import studio

    drawing = studio.pipeline(source)
    return [
        studio.Job(number, text, seed, width, height, drawing.encode(text)[0][0].float().cpu().numpy(), said)
        for number, (text, seed, width, height, said) in enumerate(prompts)
    ]


def threads(arguments: argparse.Namespace) -> int:
    """Of each process."""
    return max(1, (os.cpu_count() or 1) // arguments.processes)


def show(rows: list[dict], texts: list[str], out: Path) -> dict:
    """Write the gallery, a row a prompt; what it shows."""
    from zimage_turbo.benchmarks import quality_plots

    path = out.with_name(f"{out.stem}_gallery.png")
    quality_plots.grid(rows, path)
    return {"file": path.name, "prompts": texts[: len(rows)], "columns": list(rows[0])}


def draw_plots(report: dict, out: Path) -> None:
    from zimage_turbo.benchmarks import quality_plots

    if plots.available():
        quality_plots.write(report, out)
    else:
        print("No plots: matplotlib is not installed. Install it with: python -m pip install matplotlib")


def save(report: dict, out: Path) -> None:
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
