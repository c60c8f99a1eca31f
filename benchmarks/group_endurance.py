"""Whether a group of ranks lasts: hundreds of pictures of random sizes, prompts and splits, with cancels, and ranks
killed or stopped at random points.

Every request is made twice, the second time undisturbed: it must give the same pictures, or stop as it was told to.
After each, every rank's and this process's memory, open files and threads are noted, and the group's processes and
shared memory. In the end all must be as it was after a fifth of the pictures (endured.py), and nothing may be left.
Shared memory is the machine's: run nothing else meanwhile that makes some.
Run: ZIMAGE_COMFYUI=<tree> python benchmarks/group_endurance.py [--images 500] [--faults 0] [--cancels 0.2]
     [--devices cpu,cpu] [--models FOLDER --precision int4-fp8] [--seed 0] [--out FILE.json]
"""

import argparse
import contextlib
import json
import logging
import random
import sys
import time
import types
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks import endured, plots, weight_files  # noqa: E402
from zimage_turbo.benchmarks.conditions import conditions  # noqa: E402
from zimage_turbo.benchmarks.contestants import FILES, choice  # noqa: E402
from zimage_turbo.benchmarks.pipeline import register  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402

DEMO_SIDES, SIDES = range(128, 257, 16), range(512, 1217, 64)  # pixels
SHARED_MEMORY = Path("/dev/shm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(",")[0])
    parser.add_argument("--images", type=int, default=500, help="pictures; the last request may go beyond")
    parser.add_argument("--faults", type=float, default=0.0, help="share of requests in which a rank is hit")
    parser.add_argument("--cancels", type=float, default=0.2, help="share that is cancelled on the way")
    parser.add_argument("--devices", default="cpu,cpu", help="of the ranks, with commas: cuda:0,cuda:1")
    parser.add_argument("--models", type=Path, help="models folder; without it the demo")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write; a plot is put beside it")
    arguments = parser.parse_args()
    host.enter(host.tree(), [])
    logging.basicConfig(format="%(asctime)s %(message)s", level="WARNING")
    settings = {key: value for key, value in vars(arguments).items() if key not in ("models", "out")}
    report = conditions() | {"weights": "given" if arguments.models else "demo", "arguments": settings, "requests": []}
    segments, children = shared_memory(), own_children()
    try:
        measure(report, arguments)
    finally:
        report["left"] = {
            "processes": len(own_children() - children),
            "shared memory": sorted(shared_memory() - segments),
        }
        report |= endured.verdict(report)
        print(json.dumps({key: value for key, value in report.items() if key != "requests"}, indent=1))
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            if plots.available():
                plots.write(report, arguments.out)
    sys.exit(0 if report["held"] else 1)


def measure(report: dict, arguments: argparse.Namespace) -> None:
    import torch

    from zimage_turbo.benchmarks import census
    from zimage_turbo.benchmarks.group_requests import LIMIT, MODEL, Request
    from zimage_turbo.engine import catalogue, text
    from zimage_turbo.engine.group.coordinator import Group
    from zimage_turbo.engine.group.launch import DUTIES, Setup

    files = {}
    if arguments.models:
        register(arguments.models, FILES)
        files = weight_files.names(arguments.models)
    parts = catalogue.resolve(**choice(files))
    draw, images = random.Random(arguments.seed), 0
    devices = tuple(arguments.devices.split(","))
    setup = Setup(devices, operations=(DUTIES, census.__name__.removeprefix("zimage_turbo.")))
    with torch.inference_mode(), contextlib.closing(Group(setup)) as group:
        clip = text.load_text_encoder(parts.text_encoder, None, [], "auto", False, 0)
        load = {"diffusion_model": str(parts.diffusion_model), "vae": str(parts.vae), "precision": arguments.precision}
        began = time.monotonic()
        group.keep(MODEL, "load", load | {"key": MODEL, "attention": "auto", "cache": True}, LIMIT)
        report["start_s"] = round(time.monotonic() - began, 2)
        group.keep("meeting", "meet", {"islands": [list(range(len(devices)))], "size": len(devices)}, LIMIT)
        while images < arguments.images:
            request = Request.drawn(draw, clip, SIDES if files else DEMO_SIDES)
            images += len(request.images)
            row = {"images": images, "pictures": len(request.images), "split": request.split}
            row |= outcome(group, draw, request, arguments)
            ranks = group.call("census", lambda size: dict.fromkeys(range(size)), LIMIT)
            row |= {"state": group.document()["state"], "ranks": list(ranks.values())}
            row |= {"coordinator": census.taken(torch.device("cpu")), "processes": len(own_children())}
            row["shared memory"] = len(shared_memory())
            report["requests"].append(row)
            print(json.dumps(row), flush=True)


def outcome(group, draw: random.Random, request, arguments: argparse.Namespace) -> dict:
    """Of a request that is disturbed, held against an undisturbed second time."""
    from zimage_turbo.benchmarks.group_requests import Cancel, Disturbance

    disturbance = Disturbance.drawn(draw, group, len(request.images), arguments.faults, arguments.cancels)
    began, first = time.monotonic(), None
    with contextlib.suppress(Cancel):
        first = request.run(group, disturbance.on_step)
    ended = time.monotonic()
    disturbance.join()
    second = request.run(group)
    same = first is None or all(one.equal(other) for one, other in zip(first, second, strict=True))
    row = {"seconds": round(ended - began, 2), "cancelled": first is None, "hit": None, "same": same}
    if disturbance.at:
        row["hit"] = disturbance.how and f"{disturbance.how.name} of rank {disturbance.victim}"
        hit_here = disturbance.at < ended  # else between two requests
        row["until_done_s"] = round((ended if hit_here else time.monotonic()) - disturbance.at, 2)
    return row


def own_children() -> set:
    import psutil

    return set(psutil.Process().children(recursive=True))


def shared_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


if __name__ == "__main__":
    main()
