"""Pictures of the quality report: errors by evaluations, and a grid of what was drawn."""

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import plots

TILE, GAP, HEADING = 144, 4, 60  # pixels
LINE = 22  # characters of a heading's line
PLOTS = {"error": ("error", "relative error of the latent"), "psnr": ("psnr_db", "PSNR of the picture, dB")}


def write(report: dict, result: Path) -> None:
    """The plots of a report on solvers, beside the file that it is in."""
    for kind, (key, label) in PLOTS.items():
        path = result.with_name(f"{result.stem}_{kind}.png")
        plots.save(plots.title(report), functools.partial(by_evaluations, report, key=key, label=label), path)
        print(f"wrote {path}")


def by_evaluations(report: dict, axes, key: str, label: str) -> None:
    """A line for every solver: means and their intervals by evaluations really made."""
    names = dict.fromkeys((row["by"], plain(row)) for row in report["solvers"])
    for by, name in names:
        rows = [row for row in report["solvers"] if (row["by"], plain(row)) == (by, name)]
        points = sorted((row["evaluations"], row[key]["mean"], *row[key]["interval"]) for row in rows)
        x, y, low, high = (np.array(values) for values in zip(*points, strict=True))
        style = {"fmt": "o-", "linewidth": 1.8} if by == "ours" else {"fmt": "x--", "linewidth": 1}
        axes.errorbar(x, y, (y - low, high - y), markersize=4, capsize=2, label=name, **style)
    if key == "error":
        axes.set_yscale("log")
    axes.set_xlabel("model evaluations a picture, mean")
    axes.set_ylabel(f"{label}, against {report['reference']['steps']} steps")


def plain(row: dict) -> str:
    """What a way is called whatever its steps."""
    return row["name"].partition(",")[0]


def grid(rows: list[dict[str, np.ndarray]], path: Path) -> None:
    """Write a PNG: a row a prompt, a column a mode under its name, from rows of the same names."""
    names = list(rows[0])
    width, height = len(names) * (TILE + GAP) - GAP, HEADING + len(rows) * (TILE + GAP) - GAP
    sheet = Image.new("RGB", (width, height), (250, 250, 250))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, name in enumerate(names):
        left = column * (TILE + GAP)
        pen.multiline_text((left + 2, 2), folded(name), (25, 25, 25), font, spacing=1)
        for row, pictures in enumerate(rows):
            tile = Image.fromarray(pictures[name]).resize((TILE, TILE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (left, HEADING + row * (TILE + GAP)))
    sheet.save(path, optimize=True)
    print(f"wrote {path}")


def folded(name: str) -> str:
    """In lines that fit above a column, without the characters that Pillow's font lacks."""
    lines = [""]
    for word in name.encode("ascii", "ignore").decode().split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if len(longer) <= LINE else [*lines, word]
    return "\n".join(lines)
