"""Whether a group of ranks keeps its word: pictures of random sizes and prompts, with cancels, and ranks killed or
stopped at random points.

Every request must give the latents that an undisturbed group gives, or stop as it was told to; the time from a fault to
the end of the request that it hit is noted, and so are every rank's memory and the open files after each request. At
the end no process and no piece of shared memory may be left.
Run: ZIMAGE_COMFYUI=<tree> python benchmarks/group_endurance.py [--count 50] [--faults 0.4] [--cancels 0.2]
     [--devices cpu,cpu] [--models FOLDER --precision int4-fp8] [--seed 0] [--out FILE.json]
"""

import argparse
import contextlib
import json
import logging
import random
import signal
import sys
import threading
import time
import types
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks import weight_files  # noqa: E402
from zimage_turbo.benchmarks.conditions import conditions  # noqa: E402
from zimage_turbo.benchmarks.contestants import FILES, choice, prompt_text  # noqa: E402
from zimage_turbo.benchmarks.pipeline import register  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402

STEPS, LIMIT = 8, 600.0
DEMO_SIZES = ((128, 128), (160, 96), (96, 160), (208, 112), (256, 256))
SIZES = ((512, 512), (640, 400), (768, 768), (1024, 1024), (1216, 832))
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
SHARED_MEMORY = Path("/dev/shm")


class Cancel(Exception):
    """What stands for a user's interruption."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50, help="requests")
    parser.add_argument("--faults", type=float, default=0.4, help="share of requests in which a rank is hit")
    parser.add_argument("--cancels", type=float, default=0.2, help="share that is cancelled on the way")
    parser.add_argument("--devices", default="cpu,cpu", help="of the ranks, with commas: cuda:0,cuda:1")
    parser.add_argument("--models", type=Path, help="models folder; without it the demo")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    host.enter(host.tree(), [])
    logging.basicConfig(format="%(asctime)s %(message)s", level="WARNING")
    report = conditions() | {"arguments": {key: str(value) for key, value in vars(arguments).items()}, "requests": []}
    segments, children = shared_memory(), own_children()
    try:
        measure(report, arguments)
    finally:
        report["left"] = {
            "processes": len(own_children() - children),
            "shared memory": sorted(shared_memory() - segments),
        }
        summarise(report)
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if report["held"] else 1)


def measure(report: dict, arguments: argparse.Namespace) -> None:
    import torch

    from zimage_turbo.engine import catalogue, text
    from zimage_turbo.engine.group.coordinator import Group
    from zimage_turbo.engine.group.launch import Setup

    files = {}
    if arguments.models:
        register(arguments.models, FILES)
        files = weight_files.names(arguments.models)
    parts = catalogue.resolve(**choice(files))
    draw = random.Random(arguments.seed)
    with torch.inference_mode(), contextlib.closing(Group(Setup(tuple(arguments.devices.split(","))))) as group:
        clip = text.load_text_encoder(parts.text_encoder, None, [], "auto", False, 0)
        load = {"diffusion_model": str(parts.diffusion_model), "vae": str(parts.vae), "precision": arguments.precision}
        began = time.monotonic()
        group.keep("model", "load", load | {"key": "model", "attention": "auto", "cache": True}, LIMIT)
        report["start_s"] = round(time.monotonic() - began, 2)
        for number in range(arguments.count):
            wanted = images(draw, clip, SIZES if files else DEMO_SIZES)
            row = request(group, draw, wanted, arguments)
            row |= {"number": number, "images": len(wanted), "memory_mib": memory(group), "files": open_files()}
            report["requests"].append(row)
            print(json.dumps(row), flush=True)


def images(draw: random.Random, clip, sizes: tuple) -> list[dict]:
    """One to five, of one size and prompt each."""
    import torch

    from zimage_turbo.engine import text

    made = []
    for _ in range(draw.randint(1, 5)):
        width, height = draw.choice(sizes)
        start, seed = torch.zeros(1, 16, height // 8, width // 8), draw.getrandbits(32)
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))
        positive = text.encode(clip, prompt_text(draw.getrandbits(16)))
        made.append({"noise": noise, "latent": start, "mask": None, "seed": seed, "positive": positive})
    return made


def request(group, draw: random.Random, wanted: list[dict], arguments: argparse.Namespace) -> dict:
    """Ask for images, hit a rank or cancel on the way, and hold what comes against an undisturbed second time."""
    hit, cancel = draw.random() < arguments.faults, draw.random() < arguments.cancels
    after = draw.randrange(STEPS * len(wanted))  # steps, of all images
    delay = draw.random() * 0.3
    victim, how, done, struck = draw.randrange(len(group.document()["ranks"])), draw.choice(SIGNALS), [], []

    def strike() -> None:
        """At any point between two steps, not at their ends alone."""
        import psutil

        pid = group.document()["ranks"][victim]["pid"]
        time.sleep(delay)
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).send_signal(how)
            struck.append(time.monotonic())

    def on_step(*_) -> None:
        done.append(None)
        if len(done) == after + 1 and hit:
            threading.Thread(target=strike).start()
        if len(done) > after and cancel and not hit:
            raise Cancel

    began, row = time.monotonic(), {"hit": how.name if hit else None, "cancel": cancel and not hit}
    try:
        first = drawn(group, wanted, on_step)
    except Cancel:
        first = None
    ended = time.monotonic()
    row["seconds"] = round(ended - began, 2)
    if struck and struck[0] < ended:
        row["after_fault_s"] = round(ended - struck[0], 2)
    second = drawn(group, wanted, lambda *_: None)
    row["state"] = group.document()["state"]
    row["same"] = first is None or all(
        one["latent"].equal(other["latent"]) and one["picture"].equal(other["picture"])
        for one, other in zip(first, second, strict=True)
    )
    return row


def drawn(group, wanted: list[dict], on_step) -> list[dict]:
    from zimage_turbo.engine import ode, spread

    common = {"key": "model", "sigmas": ode.sigmas(STEPS), "solver": "official", "tolerance": ode.TOLERANCE}
    return spread.draw(group, common | {"decode": True, "previews": False}, wanted, LIMIT, on_step)


def memory(group) -> dict[int, int]:
    """MiB by process id."""
    return {rank["pid"]: rank["memory_mib"] for rank in group.document()["ranks"]}


def open_files() -> int:
    import psutil

    return psutil.Process().num_fds()


def own_children() -> set:
    import psutil

    return set(psutil.Process().children(recursive=True))


def shared_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


def summarise(report: dict) -> None:
    """Adds what matters, and whether it held."""
    rows = report["requests"]
    waits = sorted(row["after_fault_s"] for row in rows if "after_fault_s" in row)
    files = [row["files"] for row in rows]
    report["summary"] = {
        "requests": len(rows),
        "hit": {each.name: sum(row["hit"] == each.name for row in rows) for each in SIGNALS},
        "cancelled": sum(row["cancel"] for row in rows),
        "same": sum(row["same"] for row in rows),
        "seconds after a fault, median and most": [waits[len(waits) // 2], waits[-1]] if waits else None,
        "open files, first and last": [files[0], files[-1]] if files else None,
    }
    report["held"] = (
        len(rows) == int(report["arguments"]["count"])
        and all(row["same"] for row in rows)
        and not report["left"]["processes"]
        and not report["left"]["shared memory"]
    )
    print(json.dumps(report["summary"] | {"left": report["left"], "held": report["held"]}, indent=1))


if __name__ == "__main__":
    main()
