"""From IMAGE to PNG files: a batch at once, each file whole or not there."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import png

LONGEST_NAME = 255  # bytes, of a file or folder on the usual file systems
ADDED = len("._00001_.png.part")  # while it is written


def name_problem(prefix: str) -> str | None:
    """Why no picture can be written under names that begin so, as far as the prefix alone tells."""
    if "\0" in prefix:
        return f"filename_prefix is {prefix!r}, and no file has U+0000 in its name. Delete it."
    *folders, name = (len(part.encode("utf-8", "surrogatepass")) for part in prefix.replace("\\", "/").split("/"))
    most = LONGEST_NAME - ADDED
    if name > most or max(folders, default=0) > LONGEST_NAME:
        shown = prefix if len(prefix) <= 60 else f"{prefix[:50]}…"
        return (
            f"filename_prefix is '{shown}', of {len(prefix)} characters: a file's name may take {most} bytes before "
            f"its number, a folder's {LONGEST_NAME}. Shorten it."
        )
    return None


def check(images: torch.Tensor) -> None:
    """Raises ValueError if that is no IMAGE of at least one picture."""
    if images.ndim != 4 or images.shape[3] not in png.COLOUR_TYPES or not images.numel():
        raise ValueError(
            f"images has the shape {list(images.shape)}; expected [pictures, height, width, 3 or 4], none of them 0. "
            "Connect the IMAGE of a VAE Decode node, or of any other node that gives pictures in colour."
        )


def levels(image: torch.Tensor) -> torch.Tensor:
    """Floats of 0 to 1 as uint8 0 to 255 of the same shape: clipped, the fraction cut off, as the host does.

    Made where the image lies, so that a quarter of its bytes leave a GPU.
    """
    return (image * 255.0).clamp_(0, 255).to(torch.uint8, memory_format=torch.contiguous_format)


def save(
    images: torch.Tensor,
    paths: Sequence[Path],
    text: Mapping[str, str],
    threads: int,
    on_saved: Callable[[], object] = lambda: None,
) -> None:
    """Writes images [pictures, height, width, 3 or 4], 0 to 1, as PNG files with `text`, in order.

    threads: how many deflate. Calls on_saved after each picture. Raises OSError if a file cannot be written; of that
    one nothing stays.
    """
    shape = tuple(images.shape[1:])
    batch = [png.filtered(levels(image).cpu().numpy()) for image in images]
    pool = ThreadPoolExecutor(threads, "png")
    try:
        for bands, path in zip([png.deflate(rows, pool) for rows in batch], paths, strict=True):
            unfinished = path.with_name(f".{path.name}.part")
            try:
                with unfinished.open("wb") as file:
                    png.write(file, shape, bands, text)
                os.replace(unfinished, path)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
            on_saved()
    finally:
        pool.shutdown(cancel_futures=True)
