"""The whole way to a picture with no more GPU memory than a small card has: weights, encoder, denoiser and decoder.

torch's allocator is capped hard, so that one byte more fails, and ComfyUI is told to leave the rest of the card alone
(--reserve-vram), so that it decides what to offload as on a card of that size. In every precision: load the three
models through the pack's loader, then draw new prompts. After each step it is looked up where every weight lies.
Run: ZIMAGE_COMFYUI=<tree> python benchmarks/memory.py (--random-weights FOLDER | --models FOLDER) --cap 8
     [--precision int4 int4-fp8] [--size 1024] [--count 3] [--out FILE.json]
The first precision makes the INT4 files beside the originals, the next ones read them. The driver's context, which a
process has beside what it allocates, is not under the cap; the device's own count is given too.
"""

import argparse
import json
import logging
import sys
import tempfile
import types
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks import plots, weight_files  # noqa: E402
from zimage_turbo.benchmarks.allocator_log import AllocatorLog, mib  # noqa: E402
from zimage_turbo.benchmarks.conditions import conditions  # noqa: E402
from zimage_turbo.benchmarks.contestants import FILES, prompt_text  # noqa: E402
from zimage_turbo.benchmarks.pipeline import Pipeline, held, register  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402

GIB = 2**30
ELSEWHERE = 2**20  # bytes of scalars that the host keeps in RAM with any model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    weight_files.add_arguments(parser)
    parser.add_argument("--cap", type=float, required=True, help="GiB that may be allocated")
    parser.add_argument("--precision", nargs="+", default=["int4", "int4-fp8"])
    parser.add_argument("--size", type=int, default=1024, help="side of the square pictures")
    parser.add_argument("--count", type=int, default=3, help="pictures, each of a new prompt")
    parser.add_argument("--options", nargs="*", default=[], help="of ComfyUI, without the two dashes")
    parser.add_argument("--out", type=Path, help="JSON file to write; a plot is put beside it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        folder = None if arguments.demo else weight_files.folder(arguments, Path(work))
        reserve = cap(arguments.cap)
        options = [f"--{option}" for option in arguments.options]
        host.enter(host.tree(), ["--reserve-vram", f"{reserve:.3f}", *options])
        import torch

        report = conditions() | {
            "weights": weight_files.kind(arguments),
            "cap_gib": arguments.cap,
            "size": arguments.size,
            "options": options,
            "runs": [],
        }
        files = {}
        if folder:
            register(folder, FILES)
            files = weight_files.names(folder)
        with torch.inference_mode():
            for precision in arguments.precision:
                measure(report, files, precision, arguments)
        if arguments.out and plots.available():
            plots.write(report, arguments.out)
    if failed := [run["precision"] for run in report["runs"] if not drawn(run)]:
        sys.exit(f"Not drawn within {arguments.cap:g} GiB: {', '.join(failed)}.")


def cap(gib: float) -> float:
    """Allow torch no more than so many GiB; the GiB that others would have on a card with as many free."""
    import torch

    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(gib * GIB / total)
    return free / GIB - gib


def measure(report: dict, files: dict[str, str], precision: str, arguments: argparse.Namespace) -> None:
    """One precision from the files to the pictures; what fails for want of memory is part of the result."""
    import torch

    run = {"precision": precision, "phases": [], "warnings": []}
    report["runs"].append(run)
    notes = Notes(run["warnings"])
    logging.getLogger().addHandler(notes)
    try:
        with AllocatorLog() as log:
            run["phases"] = log.phases
            try:
                draw(log, files, precision, arguments)
            except torch.cuda.OutOfMemoryError as error:
                run["failed"] = str(error).partition("\n")[0]
    finally:
        logging.getLogger().removeHandler(notes)
    run["series"] = log.series()
    run["peak_allocated_gib"] = round(max(row["peak_allocated_mib"] for row in log.phases) / 1024, 3)
    run["peak_reserved_gib"] = round(max(row["peak_reserved_mib"] for row in log.phases) / 1024, 3)
    run["all_resident"] = all(row["resident"] for row in log.phases if "resident" in row) and "failed" not in run
    print(
        f"{precision:<10} cap {arguments.cap:g} GiB: peak allocated {run['peak_allocated_gib']} GiB, reserved "
        f"{run['peak_reserved_gib']} GiB, all resident: {run['all_resident']}, failed: {run.get('failed', 'no')}",
        flush=True,
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(report) + "\n", encoding="utf-8")


def draw(log: AllocatorLog, files: dict[str, str], precision: str, arguments: argparse.Namespace) -> None:
    """The phases of a run. A model goes to the GPU when it is first needed, so that counts from the second picture."""
    import torch

    with log.phase("load"):
        pipeline = Pipeline(files, precision, cache=bool(files))
    for number in range(arguments.count):
        state = {}
        for name in ("encode", "denoise", "decode"):
            with log.phase(f"{name} {number + 1}") as row:
                if name == "encode":
                    state["positive"] = pipeline.encode(prompt_text(number))
                elif name == "denoise":
                    state["latent"] = pipeline.sample(state["positive"], number, arguments.size, arguments.size)
                else:
                    picture = pipeline.decode(state["latent"])
                    row["finite"] = bool(torch.isfinite(picture).all())
            where = {part: held(patcher) for part, patcher in pipeline.patchers().items()}
            row["weights_mib"] = {part: [mib(on_gpu), mib(total)] for part, (on_gpu, total) in where.items()}
            if number:
                row["resident"] = all(total - on_gpu < ELSEWHERE for on_gpu, total in where.values())
            free, total = torch.cuda.mem_get_info()
            row["device_used_mib"] = mib(total - free)
            print(describe(row), flush=True)
    pipeline.close()


def drawn(run: dict) -> bool:
    """Whether memory was enough, and every picture one of numbers."""
    return "failed" not in run and all(row.get("finite", True) for row in run["phases"])


def describe(row: dict) -> str:
    weights = ", ".join(f"{name} {on_gpu:.0f}/{total:.0f}" for name, (on_gpu, total) in row["weights_mib"].items())
    return (
        f"  {row['phase']:<10}{row['end_s'] - row['begin_s']:>8.2f} s, peak allocated "
        f"{row['peak_allocated_mib']:.0f} MiB, reserved {row['peak_reserved_mib']:.0f} MiB; on the GPU, MiB: {weights}"
    )


class Notes(logging.Handler):
    """Keeps warnings, so that a fallback to tiles or to no graph is seen in the result."""

    def __init__(self, kept: list[str]):
        super().__init__(logging.WARNING)
        self.kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage().partition("\n")[0][:300])


if __name__ == "__main__":
    main()
