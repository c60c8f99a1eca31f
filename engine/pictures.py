"""From IMAGE to PNG files: a batch at once, each file whole or not there."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import png

LONGEST_NAME = 255  # of a file or folder on the usual file systems, in bytes, on Windows in UTF-16 units
LONGEST_FILE = LONGEST_NAME - len("._00001_.png.part")  # of which it has the rest while it is written
PLACEHOLDER = re.compile("%[^%]*%")


def name_problem(prefix: str) -> str | None:
    """Why no picture can be written under names that begin so, as far as the prefix tells without its placeholders."""
    if "\0" in prefix:
        return f"filename_prefix is {prefix!r}, and no file has U+0000 in its name. Delete it."
    *folders, file = os.path.normpath(PLACEHOLDER.sub("", prefix)).split(os.sep)
    unit = "UTF-16 units" if os.name == "nt" else "bytes"
    for kind, name, most in (*(("folder", folder, LONGEST_NAME) for folder in folders), ("file", file, LONGEST_FILE)):
        try:
            size = len(name.encode("utf-16-le")) // 2 if os.name == "nt" else len(name.encode())
        except UnicodeEncodeError:
            return f"filename_prefix is {prefix!r}, and {name!r} holds half a character. Write it anew."
        if size > most:
            return (
                f"filename_prefix names a {kind} '{name[:50]}…' of {size} {unit}, without a number; at most {most} can "
                "be saved. Shorten it."
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
