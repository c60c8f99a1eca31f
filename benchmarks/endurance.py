"""Whether memory stays where it is: many pictures in a row, each with a new prompt of another length and another size.

Every picture is encoded, denoised and decoded through the pack's nodes. Allocated memory after the last one is held
against that after the tenth.
Run: ZIMAGE_COMFYUI=<tree> python benchmarks/endurance.py (--random-weights FOLDER | --models FOLDER | --demo)
     [--count 100] [--precision int4-fp8] [--out FILE.json]
"""

import argparse
import json
import random
import sys
import tempfile
import time
import types
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks import plots, weight_files  # noqa: E402
from zimage_turbo.benchmarks.allocator_log import mib  # noqa: E402
from zimage_turbo.benchmarks.conditions import conditions  # noqa: E402
from zimage_turbo.benchmarks.contestants import FILES, prompt_text  # noqa: E402
from zimage_turbo.benchmarks.pipeline import Pipeline, register  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402

SETTLED, ALLOWED = 10, 0.01  # pictures after which memory may grow by this share no more
SIZES = (
    (1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768), (768, 1344), (1280, 800),
    (960, 1088), (1008, 1040), (512, 512), (640, 400), (400, 640), (576, 448), (496, 528),
)  # fmt: skip
DEMO_SIZES = ((256, 256), (384, 192), (192, 384), (320, 224), (208, 336))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    weight_files.add_arguments(parser)
    parser.add_argument("--count", type=int, default=100, help="pictures")
    parser.add_argument("--precision", default="int4-fp8")
    parser.add_argument("--seed", type=int, default=0, help="of the sizes and prompts")
    parser.add_argument("--out", type=Path, help="JSON file to write; a plot is put beside it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        folder = None if arguments.demo else weight_files.folder(arguments, Path(work))
        host.enter(host.tree(), [])
        import torch

        files = {}
        if folder:
            register(folder, FILES)
            files = weight_files.names(folder)
        report = conditions() | {
            "weights": weight_files.kind(arguments),
            "precision": arguments.precision,
            "seed": arguments.seed,
            "pictures": [],
        }
        with torch.inference_mode():
            measure(report, files, arguments)
    if not report.get("held", True):
        sys.exit(verdict(report))


def requests(count: int, sizes: tuple, seed: int) -> list[tuple[str, int, int]]:
    """Prompt, width and height of every picture: one to four times some 40 words, no prompt twice."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        words = ". ".join(prompt_text(1000 * number + part) for part in range(draw.randint(1, 4)))
        made.append((words, *draw.choice(sizes)))
    return made


def measure(report: dict, files: dict[str, str], arguments: argparse.Namespace) -> None:
    import torch

    pipeline = Pipeline(files, arguments.precision, cache=bool(files))
    sizes = SIZES if files else DEMO_SIZES
    for number, (text, width, height) in enumerate(requests(arguments.count, sizes, arguments.seed), 1):
        started = time.perf_counter()
        picture = pipeline.decode(pipeline.sample(pipeline.encode(text), number, width, height))
        assert picture.shape == (1, height, width, 3) and torch.isfinite(picture).all(), (number, picture.shape)
        del picture
        torch.cuda.synchronize()
        row = {
            "number": number,
            "width": width,
            "height": height,
            "letters": len(text),
            "seconds": round(time.perf_counter() - started, 3),
            "allocated_mib": mib(torch.cuda.memory_allocated()),
            "reserved_mib": mib(torch.cuda.memory_reserved()),
        }
        report["pictures"].append(row)
        if number % SETTLED == 0 or number == arguments.count:
            print(json.dumps(row), flush=True)
            finish(report, arguments.out)
    print(verdict(report))
    if arguments.out and plots.available():
        plots.write(report, arguments.out)


def finish(report: dict, out: Path | None) -> None:
    """Growth since the memory settled, and the file as it stands."""
    pictures = report["pictures"]
    if len(pictures) > SETTLED:
        settled, last = (pictures[index]["allocated_mib"] for index in (SETTLED - 1, -1))
        report["growth"] = round(last / settled - 1, 5)
        report["held"] = report["growth"] <= ALLOWED
    if out:
        out.write_text(json.dumps(report) + "\n", encoding="utf-8")


def verdict(report: dict) -> str:
    if "growth" not in report:
        return f"too few pictures to say anything: it takes more than {SETTLED}"
    count = len(report["pictures"])
    return (
        f"allocated after picture {count} against after picture {SETTLED}: {100 * report['growth']:+.2f} %, "
        f"{'within' if report['held'] else 'BEYOND'} {100 * ALLOWED:g} %"
    )


if __name__ == "__main__":
    main()
