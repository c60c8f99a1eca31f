"""Weight files and diffusers folders that are wrong in one way each, made from the demo's."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

DEMO = Path(__file__).resolve().parent.parent.parent / "demo"
SOURCES = {
    "diffusion_model": DEMO / "transformer" / "diffusion_pytorch_model.safetensors",
    "text_encoder": DEMO / "text_encoder" / "model.safetensors",
    "vae": DEMO / "vae" / "diffusion_pytorch_model.safetensors",
}
FOLDERS = {"diffusion_model": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
# Good enough to be chosen beside a diffusion model that is refused before they are read.
PLACED = {"text_encoder": "placed_text_encoder.safetensors", "vae": "placed_vae.safetensors"}
PARTS = ("transformer", "text_encoder", "tokenizer", "vae")

Write = Callable[[Path], Any]


def place(models: Path) -> None:
    """Put the files of PLACED into a models folder."""
    for kind, name in PLACED.items():
        shutil.copy(SOURCES[kind], models / FOLDERS[kind] / name)


def content(data: bytes) -> Write:
    return lambda path: path.write_bytes(data)


def beginning(kind: str, share: float) -> Write:
    """The first part of a good file, as a broken download leaves it."""
    data = SOURCES[kind].read_bytes()
    return content(data[: int(share * len(data))])


def copy_of(kind: str) -> Write:
    return lambda path: shutil.copy(SOURCES[kind], path)


def altered(kind: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Write:
    """A good file with one weight changed."""

    def write(path: Path) -> None:
        weights = load_file(SOURCES[kind])
        save_file(weights | {name: change(weights[name]).contiguous()}, path)

    return write


def without(kind: str, name: str) -> Write:
    """A good file without one weight."""
    return lambda path: save_file({key: value for key, value in load_file(SOURCES[kind]).items() if key != name}, path)


def only(**weights: list[int]) -> Write:
    """A file of zeros with these names ('__' for '.') and shapes."""
    return lambda path: save_file(
        {name.replace("__", "."): torch.zeros(shape) for name, shape in weights.items()}, path
    )


class RunsWhenUnpickled:
    """Makes a file when Python's unpickling trusts it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def mark_of(path: Path) -> Path:
    """What a pickle written by ``bare_pickle`` or ``zipped_pickle`` makes when its code runs."""
    return path.with_suffix(".ran")


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": RunsWhenUnpickled(mark_of(path))}))


def zipped_pickle(path: Path) -> None:
    torch.save({"weight": RunsWhenUnpickled(mark_of(path))}, path)


def diffusers_folder(target: Path) -> None:
    """The demo as a user's diffusers folder."""
    for part in PARTS:
        shutil.copytree(DEMO / part, target / part)
    shutil.copy(DEMO / "model_index.json", target)


def removed(relative: str) -> Write:
    def change(folder: Path) -> None:
        path = folder / relative
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def text(relative: str, written: str) -> Write:
    return lambda folder: (folder / relative).write_text(written, encoding="utf-8")


def configured(part: str, **values: Any) -> Write:
    """A part's config.json with some values changed."""

    def change(folder: Path) -> None:
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")

    return change


def replaced(relative: str, write: Write) -> Write:
    """A folder with one of its files written by ``write``."""
    return lambda folder: write(folder / relative)
