"""Reading a sign: normalised correlation of what stands there with every glyph that can be drawn."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .world import GLYPHS, Sign, sign_cell, sign_centre

SIDE = 40  # characters are read at this size, in pixels
REACH = 8  # and may stand this many of those pixels away from their place
SCALES = (0.94, 1.0)
LEGIBLE = 0.6  # correlation that a character must reach to count as drawn


@dataclass
class Reading:
    """`text` has a character a cell, '?' where none is legible; colours are RGB in 0..1."""

    text: str
    score: float
    ink: np.ndarray
    paper: np.ndarray


def glyph_templates(atlas: torch.Tensor, scale: float) -> torch.Tensor:
    """Zero-mean glyphs of unit norm, [glyphs, 1, side, side]."""
    side = round(SIDE * scale)
    glyphs = F.interpolate(atlas[:, None], size=(side, side), mode="bilinear", antialias=True)
    glyphs = glyphs - glyphs.mean((2, 3), keepdim=True)
    return glyphs / glyphs.norm(dim=(2, 3), keepdim=True)


def cut(picture: torch.Tensor, x: float, y: float, cell: float, count: int) -> torch.Tensor:
    """The strip of `count` cells around (x, y) and its margins, [3, SIDE + 2 REACH, count * SIDE + 2 REACH]."""
    height, width = picture.shape[:2]
    rows, columns = SIDE + 2 * REACH, count * SIDE + 2 * REACH
    step = cell / SIDE
    py = y + (torch.arange(rows) + 0.5 - rows / 2) * step
    px = x + (torch.arange(columns) + 0.5 - columns / 2) * step
    grid = torch.stack(torch.broadcast_tensors((px / width * 2 - 1)[None], (py / height * 2 - 1)[:, None]), -1)
    return F.grid_sample(
        picture.permute(2, 0, 1)[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0]


def contrast_map(strip: torch.Tensor) -> torch.Tensor:
    """[3, H, W] → [H, W]: the strip along the direction in which its colours vary most."""
    colours = strip.flatten(1)
    centred = colours - colours.median(1, keepdim=True).values
    _, vectors = torch.linalg.eigh(centred @ centred.T)
    return (vectors[:, -1] @ centred).view(strip.shape[1:])


def correlations(field: torch.Tensor, templates: torch.Tensor) -> torch.Tensor:
    """[H, W], [glyphs, 1, s, s] → normalised correlation at every shift [glyphs, shifts] in -1..1."""
    side = templates.shape[-1]
    # one matrix product over all shifts is many times quicker on a CPU than a convolution with large kernels
    patches = F.unfold(field[None, None], side)[0]
    power = patches.var(0, unbiased=False).clamp(min=1e-4) * side**2
    return templates.flatten(1) @ patches / power.sqrt()


def read_strip(strip: torch.Tensor, count: int, templates: list[torch.Tensor]) -> tuple[str, float]:
    """The best text of `count` characters and the mean of their correlations. Ink may be lighter or darker."""
    field = contrast_map(strip)
    best = ("?" * count, -1.0)
    scores = torch.full((2, count, len(GLYPHS)), -1.0)
    for i in range(count):
        window = field[:, i * SIDE : (i + 1) * SIDE + 2 * REACH]
        for glyphs in templates:
            found = correlations(window, glyphs)
            scores[0, i] = torch.maximum(scores[0, i], found.amax(1))
            scores[1, i] = torch.maximum(scores[1, i], (-found).amax(1))
    for signed in scores:
        top = signed.max(1)
        mean = top.values.mean().item()
        if mean > best[1]:
            text = "".join(GLYPHS[k] if v > LEGIBLE else "?" for k, v in zip(top.indices, top.values, strict=True))
            best = text, mean
    return best


def two_colours(strip: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The colours of ink and paper: the ends of the strip's contrast, the rarer of which is the ink."""
    field = contrast_map(strip)[REACH:-REACH, REACH:-REACH]
    inner = strip[:, REACH:-REACH, REACH:-REACH]
    low, high = torch.quantile(field, torch.tensor([0.02, 0.98]))
    dark, light = field <= low + 0.2 * (high - low), field >= high - 0.2 * (high - low)
    ink, paper = (dark, light) if dark.sum() < light.sum() else (light, dark)
    return tuple(inner[:, part].median(1).values.numpy() for part in (ink, paper))


def read_sign(picture: torch.Tensor, said: Sign, atlas: torch.Tensor) -> Reading:
    """Read as many characters as were said, at the said place or else at the most legible of the three."""
    height, width = picture.shape[:2]
    cell, count = sign_cell(said.text, width, height), len(said.text)
    templates = [glyph_templates(atlas, scale) for scale in SCALES]
    best = None
    for place in [said.place] if said.place else ["top", "center", "bottom"]:
        strip = cut(picture, *sign_centre(place, width, height), cell, count)
        text, score = read_strip(strip, count, templates)
        if best is None or score > best.score:
            best = Reading(text, score, *two_colours(strip))
    return best
