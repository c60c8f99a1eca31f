"""Saving pictures as PNG: the host's SaveImage beside ours, wall time from an IMAGE to files on disc.

No row is timed before every file of ours has been decoded to the pixels of the host's. Pictures: smooth waves of colour
under two grey levels of noise (natural), pure noise, and the demo's drawings, enlarged. They lie in memory as a VAE
leaves them, and on a GPU too where there is one (as with --gpu-only). `threads` bounds torch's and the encoder's.
Run: ZIMAGE_COMFYUI=<tree> python benchmarks/png.py [--size 1024 2048] [--batch 1 4] [--threads 1 2 16]
[--folder FOLDER] [--out FILE]
"""

import argparse
import json
import os
import sys
import tempfile
import time
import types
import zlib
from collections.abc import Callable
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks.conditions import conditions, version  # noqa: E402
from zimage_turbo.benchmarks.gate import insist  # noqa: E402
from zimage_turbo.benchmarks.timing import quantiles  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402

PICTURES = ("natural", "noise", "drawing")
TEXT = {"prompt": json.dumps({"1": {"inputs": {"text": "a prompt of some length" * 20}}})}
MOST, FEWEST, SECONDS = 15, 5, 4.0  # calls of a row, and how long they may take together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[1024, 2048], help="sides of pictures, in pixels")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, 2, os.cpu_count()}))
    parser.add_argument("--folder", type=Path, help="where the files are written; a temporary folder by default")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    host.enter(host.tree(), [])
    import torch

    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report = measure(arguments, Path(folder))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    insist(report["rows"])


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    import torch
    from PIL import features

    report = conditions() | {
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "pillow": version("pillow"),
        "pillow_zlib": features.version("zlib_ng") or features.version("zlib"),
        "python_zlib": zlib.ZLIB_RUNTIME_VERSION,
        "rows": [],
    }
    print(report, flush=True)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    shapes = [(name, size, batch) for name in PICTURES for size in arguments.size for batch in arguments.batch]
    for name, size, batch in shapes:
        for device in devices:
            images = pictures(name, size, batch).to(device)
            for row in compared(images, arguments.threads, folder):
                report["rows"].append({"picture": name, "size": size, "batch": batch, "device": device} | row)
                print(json.dumps(report["rows"][-1]), flush=True)
    return report


def compared(images, thread_counts: list[int], folder: Path) -> list[dict]:
    import torch
    from folder_paths import set_output_directory

    from nodes import SaveImage
    from zimage_turbo.engine import pictures

    set_output_directory(str(folder))
    paths = [folder / f"ours_{number}.png" for number in range(len(images))]
    node = SaveImage()
    rows = [{"what": "host"} | timed(lambda: node.save_images(images, "host", json.loads(TEXT["prompt"])), folder)]
    expected = saved(lambda: node.save_images(images, "host"), folder)
    for threads in thread_counts:
        torch.set_num_threads(threads)

        def ours(threads: int = threads) -> None:
            pictures.save(images, paths, TEXT, threads)

        row = {"what": "ours", "threads": threads, "gate": saved(ours, folder) == expected}
        rows.append(row | (timed(ours, folder) if row["gate"] else {}))
    torch.set_num_threads(os.cpu_count())
    return rows


def pictures(name: str, size: int, batch: int):
    """IMAGE [batch, size, size, 3] in main memory, planes of colour one after the other."""
    import numpy as np
    import torch
    from PIL import Image

    draw = np.random.default_rng(size)
    made = []
    for _ in range(batch):
        if name == "noise":
            picture = draw.random((3, size, size), np.float32)
        elif name == "natural":
            down, across = np.mgrid[0:size, 0:size].astype(np.float32) / size
            waves = [
                sum(np.sin(2 * np.pi * (x * across + y * down)) for x, y in draw.uniform(0.5, 6, (6, 2)))
                for _ in range(3)
            ]
            picture = (128 + 25 * np.stack(waves) + 2 * draw.standard_normal((3, size, size))) / 255
        else:
            with Image.open(PACK / "demo" / "grid.png") as grid:
                square = grid.convert("RGB").crop((0, 0, 512, 512)).resize((size, size), Image.Resampling.BICUBIC)
            picture = np.asarray(square).transpose(2, 0, 1) / 255
        made.append(torch.from_numpy(np.ascontiguousarray(picture, np.float32)))
    return torch.stack(made).clamp(0, 1).movedim(1, -1)


def saved(save: Callable[[], object], folder: Path) -> list[tuple[tuple[int, ...], bytes]]:
    """Size and pixels of each file that is written, by name; the folder is empty again afterwards."""
    from PIL import Image

    save()
    found = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as picture:
            found.append((picture.size, picture.tobytes()))
        path.unlink()
    return found


def timed(save: Callable[[], object], folder: Path) -> dict:
    """Median of the calls' milliseconds with p20 and p80, and the bytes of the files of one."""
    import torch

    def once() -> float:
        for path in folder.iterdir():
            path.unlink()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        save()
        return 1000 * (time.perf_counter() - started)

    first = once()
    times = [once() for _ in range(min(MOST, max(FEWEST, int(SECONDS * 1000 / first))))]
    size = sum(path.stat().st_size for path in folder.iterdir())
    for path in folder.iterdir():
        path.unlink()
    low, median, high = (round(value, 1) for value in quantiles(times))
    return {"ms": median, "ms_p20_p80": [low, high], "bytes": size}


if __name__ == "__main__":
    main()
