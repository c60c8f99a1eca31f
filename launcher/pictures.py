"""Brings a prompt's pictures from the server to where the user wants them."""

import struct
import urllib.parse
from pathlib import Path
from typing import Any

from . import server
from .report import LauncherError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def listed(outputs: dict[str, Any]) -> list[dict[str, str]]:
    """Return the saved images of all nodes, or their previews when nothing was saved."""
    images = [image for output in outputs.values() for image in output.get("images", [])]
    return [image for image in images if image["type"] == "output"] or images


def texts(outputs: dict[str, Any]) -> list[str]:
    """Return what nodes wrote as text."""
    return [text for output in outputs.values() for text in output.get("text", []) if isinstance(text, str)]


def targets(images: list[dict[str, str]], output: Path | None, folder: Path) -> list[Path]:
    """Choose a path for each image: ``output`` (numbered from the second on), else a free name in ``folder``."""
    if output is not None:
        return [output] + [output.with_stem(f"{output.stem}_{number}") for number in range(2, len(images) + 1)]
    chosen: list[Path] = []
    for image in images:
        path = folder / image["filename"]
        number = 2
        while path.exists() or path in chosen:
            path = (folder / image["filename"]).with_stem(f"{Path(image['filename']).stem}{number}")
            number += 1
        chosen.append(path)
    return chosen


def save(url: str, images: list[dict[str, str]], paths: list[Path]) -> None:
    """Copy each image of the server at ``url`` to its path, byte for byte (the workflow stays inside the PNG)."""
    for image, path in zip(images, paths, strict=True):
        query = urllib.parse.urlencode({key: image[key] for key in ("filename", "subfolder", "type")})
        try:
            path.write_bytes(server.fetch(f"{url}/view?{query}"))
        except OSError as error:
            raise LauncherError(
                f"the picture could not be written to {path}: {error}", "choose another place with --output FILE"
            ) from error


def size_text(path: Path) -> str:
    """Return ``1024x1024, 1,434 kB`` for a PNG, only the file size for other formats."""
    head = path.read_bytes()[:24]
    size = f"{path.stat().st_size / 1000:,.0f} kB"
    if not head.startswith(PNG_SIGNATURE):
        return size
    width, height = struct.unpack(">II", head[16:24])
    return f"{width}x{height}, {size}"
