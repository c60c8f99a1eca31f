"""Prompt posted to picture in the history, through a real ComfyUI server's API: stock nodes and ours in one run.

Run: ZIMAGE_COMFYUI=<tree> python benchmarks/server.py (--models FOLDER | --random-weights FOLDER | --demo)
     [--size 1024 512 2048] [--batch 1 2 4 8] [--precision bf16 fp8 int4-fp8 int4] [--split sequence] [--count 10]
     [--ours] [--out FILE]
Every contestant has a server and a base directory of its own and gets the same prompts, every timed one new to it.
Per size and batch: one prompt warms it up and is held against the host's fp32 picture (gate.py); only a right picture
is followed by timed prompts. The first size and batch also give the first picture after the start and a full queue.
No contestant finds compiled kernels or quantised weights on disk. Ours draw one picture so, and are measured in their
second start, with what the first kept there.
Memory is that of the server's processes, sampled every 50 ms; a row's peak includes what earlier rows left reserved.
"""

import argparse
import asyncio
import json
import os
import platform
import shlex
import signal
import subprocess
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

from zimage_turbo.benchmarks import server_run, stock_formats, weight_files  # noqa: E402
from zimage_turbo.benchmarks.conditions import commit  # noqa: E402
from zimage_turbo.benchmarks.contestants import FILES, OURS, Contestant, contestants, reference  # noqa: E402
from zimage_turbo.benchmarks.server_client import PromptFailed  # noqa: E402
from zimage_turbo.launcher import machine, pyproject  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402
from zimage_turbo.launcher.report import LauncherError  # noqa: E402

PRECISIONS = {"gpu": ["bf16", "fp8", "int4-fp8", "int4"], "cpu": ["auto"]}
BATCHES = {"gpu": [1, 2, 4, 8], "cpu": [1]}


def main() -> None:
    arguments = parse(sys.argv[1:])
    nvidia = machine.nvidia()
    device = "gpu" if nvidia else "cpu"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception it ends the server on its way out
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        folder = weight_files.folder(arguments, Path(work))
        plan = server_run.Plan(
            host.tree(), PACK, Path(work), folder, weight_files.names(folder), arguments.demo, arguments.size,
            arguments.batch or BATCHES[device], arguments.count, arguments.queue, nvidia is not None,
        )  # fmt: skip
        entries = contestants(
            arguments.demo, arguments.precision or PRECISIONS[device],
            formats(plan) if arguments.stock_formats else {}, arguments.split,
        )  # fmt: skip
        entries = [entry for entry in entries if entry.name.startswith(OURS) or not arguments.ours]
        try:
            report = asyncio.run(run(plan, entries, weight_files.kind(arguments), nvidia, arguments.out))
        except LauncherError as error:
            sys.exit(error.render())
        except PromptFailed as error:
            sys.exit(f"The reference could not be drawn, so nothing was measured: {error}")
    if wrong := [entry["name"] for entry in report["contestants"] if entry["name"].startswith(OURS) and faulty(entry)]:
        sys.exit(f"Not measured as asked: {'; '.join(wrong)}.")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    weight_files.add_arguments(parser)
    parser.add_argument("--size", type=int, nargs="+", default=[1024, 512, 2048], help="sides of square pictures")
    parser.add_argument("--batch", type=int, nargs="+", help="pictures drawn at once; 1 2 4 8, without a GPU 1")
    parser.add_argument("--precision", nargs="+", help="ours; bf16 fp8 int4-fp8 int4, without a GPU auto")
    parser.add_argument(
        "--stock-formats", action="store_true", help="the stock nodes also with the host's int8 and W4A8, --gpu-only"
    )
    parser.add_argument(
        "--split", nargs="*", default=[], metavar="HOW", help="ours on all GPUs too: auto, images or sequence"
    )
    parser.add_argument("--ours", action="store_true", help="leave out the stock nodes")
    parser.add_argument("--count", type=int, default=10, help="timed prompts; for a batch of n an n-th, at least 3")
    parser.add_argument("--queue", type=int, default=12, help="prompts posted at once")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args(words)
    for name in ("size", "batch", "count", "queue"):
        given = getattr(arguments, name)
        if given is not None and min(given if isinstance(given, list) else [given]) < 1:
            parser.error(f"--{name} {given}: expected whole numbers from 1 on")
    if wrong := [size for size in arguments.size if size % 16]:
        parser.error(f"--size {wrong[0]}: expected a multiple of 16 pixels")
    return arguments


def formats(plan: server_run.Plan) -> dict[str, str]:
    """Files in the host's own low-bit formats, made in the working folder; by format the name."""
    source, made = plan.models / FILES[0] / plan.files[FILES[0]], plan.work / FILES[0]
    made.mkdir()
    subprocess.run([sys.executable, weight_files.MAKER, made, "--stock-formats", source], check=True)
    return {form: stock_formats.file_name(form) for form in stock_formats.FORMATS}


async def run(
    plan: server_run.Plan, entries: list[Contestant], kind: str, nvidia: machine.Nvidia | None, out: Path | None
) -> dict:
    """Measure all for the report; table and file grow contestant by contestant: a run cut short leaves what it has."""
    judge = reference(plan.demo)
    gate, stats = await server_run.draw_reference(judge, plan)
    report = {
        "date": time.strftime("%Y-%m-%d"), "command": command(sys.argv[1:]), **commit(),
        "hardware": hardware(nvidia), "driver": nvidia.driver if nvidia else None,
        "versions": server_run.versions(stats, pyproject.read(PACK / "pyproject.toml", "project", "version")),
        "weights": kind, "steps": 8, "reference": judge.name, "unrelated": gate.unrelated, "contestants": [],
    }  # fmt: skip
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print(f"{report['hardware']}; driver {report['driver']}; {named}; weights: {kind}", flush=True)
    print(f"{'contestant':<40}{'size':>6}{'batch':>6}{'p20':>9}{'p50':>9}{'p80':>9}{'s/image':>9}{'GPU MiB':>9}"
          f"{'RAM MiB':>9}{'error':>9}{'bound':>9}")  # fmt: skip
    for contestant in entries:
        entry = {"name": contestant.name, "options": list(contestant.options)}
        entry |= await server_run.measure(contestant, plan, gate)
        report["contestants"].append(entry)
        print("\n".join(lines(entry)), flush=True)
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def faulty(entry: dict) -> bool:
    """Whether something of a contestant broke down or drew a wrong picture."""
    starts = [entry["first_start"], entry] if "first_start" in entry else [entry]
    asked = [*starts, *(row for start in starts for row in start.get("rows", []))]
    return any("failed" in one or not one.get("gate", True) for one in asked)


def lines(entry: dict) -> Iterator[str]:
    """A contestant's part of the table."""
    for row in entry.get("rows", []):
        head = f"{entry['name']:<40}{row['size']:>6}{row['batch']:>6}"
        memory = "".join(f"{'-' if row[key] is None else row[key]:>9}" for key in ("peak_gpu_mib", "peak_ram_mib"))
        if "failed" in row:
            yield f"{head}  failed: {row['failed']}"
            continue
        error, bound = f"{row['error']:.4f}", "none" if row["bound"] is None else f"{row['bound']:.4f}"
        if not row["gate"]:
            yield f"{head}  wrong picture, no times: error {error}, bound {bound}"
            continue
        times = "".join(f"{row[key]:>9.3f}" for key in ("p20_s", "p50_s", "p80_s"))
        yield f"{head}{times}{row['p50_s'] / row['batch']:>9.3f}{memory}{error:>9}{bound:>9}"
    if "first_image_s" in entry:
        queue = entry["queue"]
        yield f"{'':<4}{len(queue['ends_s'])} queued prompts: {queue['images_per_s']:.2f} images/s"
        yield f"{'':<4}start:            {begun(entry)}"
    if "first_start" in entry:
        yield f"{'':<4}first start ever: {begun(entry['first_start'])}"
    for key in ("skipped", "failed"):
        if key in entry:
            yield f"{entry['name']:<40}  {key}: {entry[key]}"


def begun(start: dict) -> str:
    """How long the first picture of a server took."""
    if "failed" in start:
        return f"failed: {start['failed']}"
    ready = f"ready after {start['start_s']:.1f} s, "
    if "first_image_s" not in start:
        (row,) = start["rows"]
        return ready + (row.get("failed") or f"then a wrong picture: error {row['error']:.4f}")
    first = start["first_image_s"]
    return f"{ready}first picture {first:.2f} s later ({start['start_s'] + first:.1f} s); compiled: {start['compiled']}"


def command(words: list[str]) -> str:
    """The command as given, folders shortened to their names: results are published."""
    shortened = [Path(word).name if os.sep in word else word for word in words]
    return shlex.join(["python", "benchmarks/server.py", *shortened])


def hardware(nvidia: machine.Nvidia | None) -> str:
    gpus = [f"{gpu.name}, {machine.gib(gpu.total)}" for gpu in nvidia.gpus] if nvidia else ["no GPU"]
    return "; ".join([*gpus, f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"])


if __name__ == "__main__":
    main()
