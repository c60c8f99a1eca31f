"""Does a picture show what the words said? Plain image analysis of shapes, colours, places and characters.

A picture is [H, W, 3] in 0..1. What was said is a `Scene` in which None stands for what the words left open.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage

from .picture import load_atlas, palette, shape_cover
from .reading import read_sign
from .world import COLOURS, KINDS, RADIUS, Scene, Shape, anchor

COLOUR_REACH = 0.30  # a pixel belongs to a palette colour that is nearest and nearer than this
TEMPLATE_SIDE = 48
ENOUGH_OVERLAP = 0.72  # of a component with the shape's template; wrong kinds reach 0.66 at most
PLACE_REACH = 32  # in units: places are 66 and more apart
MIDDLE_RADIUS = (RADIUS["small"] * RADIUS["large"]) ** 0.5


@dataclass
class Found:
    """A patch of one colour and the shape it looks like. Lengths in pixels."""

    colour: str
    kind: str
    overlap: float
    x: float
    y: float
    radius: float


@dataclass
class Verdict:
    """What was right, item by item, in the order of the scene."""

    ground: bool | None = None
    shapes: list[bool] = field(default_factory=list)
    characters: list[bool] = field(default_factory=list)
    sign_colours: list[bool] = field(default_factory=list)

    @property
    def all_right(self) -> bool:
        return self.ground is not False and all(self.shapes) and all(self.characters) and all(self.sign_colours)


@lru_cache(maxsize=1)
def shape_templates() -> tuple[np.ndarray, np.ndarray]:
    """Every kind at three small turns, cut to its box: masks [kinds, turns, side, side].

    With them come the box's half extents and its centre, in units of the radius [kinds, turns, 4].
    """
    axis = (torch.arange(1000) + 0.5) / 1000 * 2.4 - 1.2
    masks = np.zeros((len(KINDS), 3, TEMPLATE_SIDE, TEMPLATE_SIDE), bool)
    boxes = np.zeros((len(KINDS), 3, 4))
    zero, one = torch.zeros(1), torch.ones(1)
    for k in range(len(KINDS)):
        for t, turn in enumerate((-0.08, 0.0, 0.08)):
            px, py = axis.view(1, -1), axis.view(-1, 1)
            cover = shape_cover(px, py, zero, zero, one, torch.tensor(turn), torch.tensor(k))
            mask = (cover > 0.5).numpy()
            rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
            x, y = axis[columns[[0, -1]]].numpy(), axis[rows[[0, -1]]].numpy()
            boxes[k, t] = (x[1] - x[0]) / 2, (y[1] - y[0]) / 2, x.mean(), y.mean()
            masks[k, t] = resize_mask(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return masks, boxes


def resize_mask(mask: np.ndarray) -> np.ndarray:
    """A boolean mask of any size at TEMPLATE_SIDE squared, by nearest neighbour."""
    rows, columns = ((np.arange(TEMPLATE_SIDE) + 0.5) * n / TEMPLATE_SIDE for n in mask.shape)
    return mask[rows.astype(int)[:, None], columns.astype(int)[None]]


@lru_cache(maxsize=1)
def colour_table() -> np.ndarray:
    return palette().numpy()


def colour_of(rgb: np.ndarray) -> str:
    return COLOURS[int(np.linalg.norm(colour_table() - rgb, axis=1).argmin())]


def colour_map(picture: np.ndarray) -> np.ndarray:
    """[H, W, 3] → the index of each pixel's palette colour, or -1 where none is near."""
    distance = np.stack([((picture - rgb) ** 2).sum(-1) for rgb in colour_table()])
    nearest = distance.argmin(0)
    return np.where(distance.min(0) < COLOUR_REACH**2, nearest, -1)


def classify(mask: np.ndarray) -> tuple[int, float, tuple[float, float, float]]:
    """A component cut to its box → kind, overlap with its template, and (dx, dy, radius) of the shape in the box."""
    masks, boxes = shape_templates()
    small = resize_mask(mask)
    overlap = (masks & small).sum((2, 3)) / (masks | small).sum((2, 3))
    # a shape fits its box in width and height alike: punish templates that would have to be stretched
    height, width = mask.shape
    stretch = (width / boxes[..., 0]) / (height / boxes[..., 1])
    overlap = overlap * np.minimum(stretch, 1 / stretch)
    kind, turn = np.unravel_index(overlap.argmax(), overlap.shape)
    across, down, dx, dy = boxes[kind, turn]
    radius = (width / across + height / down) / 4
    return int(kind), float(overlap[kind, turn]), (-dx * radius, -dy * radius, radius)


def find_shapes(colours: np.ndarray, colour: str, hidden: np.ndarray | None = None) -> list[Found]:
    """All patches of a colour that are as large as a shape. `hidden` marks pixels that something else covers."""
    mask = colours == COLOURS.index(colour)
    smallest = RADIUS["small"] * min(colours.shape) / 256
    patches = mask if hidden is None else mask | hidden
    labels, _ = ndimage.label(ndimage.binary_opening(patches, iterations=1))
    found = []
    for rows, columns in ndimage.find_objects(labels):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if max(height, width) < smallest or min(height, width) < smallest * 0.7:
            continue
        label = labels[rows, columns]
        inside = label == np.bincount(label[label > 0]).argmax()
        if not (inside & mask[rows, columns]).any():
            continue
        kind, overlap, (dx, dy, radius) = classify(inside)
        found.append(
            Found(
                colour,
                KINDS[kind],
                overlap,
                (columns.start + columns.stop) / 2 + dx,
                (rows.start + rows.stop) / 2 + dy,
                radius,
            )
        )
    return found


def matches(found: Found, said: Shape, scene: Scene) -> bool:
    """Is what was found what was said, in everything that was said?"""
    if found.overlap < ENOUGH_OVERLAP or (said.kind and found.kind != said.kind):
        return False
    size = "large" if found.radius > MIDDLE_RADIUS * scene.unit else "small"
    if said.size and size != said.size:
        return False
    if said.place:
        x, y = anchor(said.place, said.size or size, scene.width, scene.height)
        return bool(max(abs(found.x - x), abs(found.y - y)) < PLACE_REACH * scene.unit)
    return True


def open_attributes(said: Shape) -> int:
    return [said.colour, said.size, said.place].count(None)


def judge_shapes(picture: np.ndarray, scene: Scene) -> list[bool]:
    """Each said shape must be met by a patch of its own."""
    found, pixels = {}, colour_map(picture)
    for shape in scene.shapes:
        for colour in [shape.colour] if shape.colour else COLOURS:
            if colour not in found:
                found[colour] = find_shapes(pixels, colour)
    if scene.stacked:
        below, above = scene.shapes
        hidden = ndimage.binary_dilation(pixels == COLOURS.index(above.colour), iterations=3)
        found[below.colour] = found[below.colour] + find_shapes(pixels, below.colour, hidden)
    met: list[Found | None] = [None] * len(scene.shapes)
    # the most closely described first, so that a vague one does not take what another needs
    for index in sorted(range(len(met)), key=lambda i: open_attributes(scene.shapes[i])):
        shape = scene.shapes[index]
        colours = [shape.colour] if shape.colour else COLOURS
        match = next((f for c in colours for f in found[c] if matches(f, shape, scene)), None)
        if match:
            found[match.colour].remove(match)
        met[index] = match
    right = [m is not None for m in met]
    if all(right) and scene.relation:
        first, second = met
        holds = bool(first.y < second.y if scene.relation == "above" else first.x < second.x)
        right = [holds, holds]
    if all(right) and scene.stacked:
        near = bool(max(abs(met[0].x - met[1].x), abs(met[0].y - met[1].y)) < PLACE_REACH * scene.unit)
        right = [near, near]
    return right


def judge_ground(picture: np.ndarray, ground: tuple[str, str]) -> bool:
    """The upper and the lower edge must have the said colours."""
    edges = picture[2:6], picture[-6:-2]
    return all(
        colour_of(np.median(edge.reshape(-1, 3), axis=0)) == colour for edge, colour in zip(edges, ground, strict=True)
    )


def judge(picture: torch.Tensor, scene: Scene) -> Verdict:
    """picture: [H, W, 3] in 0..1, of the scene's size. Raises ValueError if the size differs."""
    height, width = picture.shape[:2]
    if (width, height) != (scene.width, scene.height):
        raise ValueError(f"the picture is {width}x{height}, but the scene is {scene.width}x{scene.height}")
    pixels = picture.float().cpu().numpy()
    verdict = Verdict(ground=judge_ground(pixels, scene.ground) if scene.ground else None)
    verdict.shapes = judge_shapes(pixels, scene)
    if scene.sign:
        reading = read_sign(picture.float().cpu(), scene.sign, load_glyphs())
        verdict.characters = [a == b for a, b in zip(reading.text, scene.sign.text, strict=True)]
        for said, seen in ((scene.sign.ink, reading.ink), (scene.sign.board, reading.paper)):
            if said:
                verdict.sign_colours.append(colour_of(seen) == said)
    return verdict


@lru_cache(maxsize=1)
def load_glyphs() -> torch.Tensor:
    return load_atlas()
