"""The quantised form of a model, kept in a file beside the original so that the next start only reads it.

Files are written one after the other on a thread of their own, while the first picture is drawn; writing 6 GB may take
longer than that. Nobody changes weights where they lie in main memory: the host patches and moves copies.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from . import quantiser
from .checkpoint import Checkpoint

SOURCE = "zimage_source"  # metadata: what it was made from

_writer = ThreadPoolExecutor(1, "cache-file")  # the process does not end before the file is written
_unfinished: dict[Path, Future] = {}


def place(path: Path, precision: str) -> Path:
    """Where the quantised form of a file or folder is kept: beside it."""
    return path.with_name(f"{path.stem}_{quantiser.FORMS[precision].removeprefix('zimage_')}.safetensors")


def read(path: Path, precision: str) -> Checkpoint | None:
    """The kept form of `path`, if there is one and it was made from what is there now; one being written is awaited."""
    kept = place(path, precision)
    if kept in _unfinished:
        _unfinished.pop(kept).result()
    if not kept.is_file():
        return None
    checkpoint = Checkpoint.read(kept)
    if checkpoint.metadata.get(SOURCE) == source_of(path):
        return checkpoint.configured(path) if path.is_dir() else checkpoint
    logging.info("Z-Image-Turbo: %s was made from another version of %s; quantising anew.", kept.name, path.name)
    return None


def write(checkpoint: Checkpoint, path: Path, precision: str) -> None:
    """Have the quantised form kept. Its weights must stay as they are.

    A disk that is full or read-only is logged: the model itself can be used.
    """
    kept = place(path, precision)
    metadata = {"format": "pt", SOURCE: source_of(path)}
    _unfinished[kept] = _writer.submit(_save, dict(checkpoint.weights), kept, metadata)


def source_of(path: Path) -> str:
    """What tells one version of a file or folder from another: the names, sizes and times of its files."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return ";".join(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)


def _save(weights: dict, kept: Path, metadata: dict[str, str]) -> None:
    """A file that is half written is never seen under the final name."""
    partial = kept.with_suffix(".partial")
    try:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, partial, metadata=metadata)
        partial.replace(kept)
    except (OSError, SafetensorError, MemoryError) as error:
        logging.warning("Z-Image-Turbo: %s could not be kept: %s", kept, error)
        partial.unlink(missing_ok=True)
        return
    except Exception:  # on this thread nobody else would hear of it
        logging.exception("Z-Image-Turbo: %s could not be written.", kept)
        return
    logging.info("Z-Image-Turbo: kept %s (%.1f GB).", kept, kept.stat().st_size / 1e9)
