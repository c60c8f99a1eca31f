"""Scenes drawn with signed distances in tensor code, and the arrays that describe a scene to it."""

import math
import pathlib

import numpy as np
import torch

from .world import COLOURS, GLYPHS, KINDS, MAX_CHARACTERS, MAX_SHAPES, RGB, Scene

ATLAS_PATH = pathlib.Path(__file__).with_name("glyph_atlas.npz")
FAR = -5000.0  # where shapes stand that are not there
FIELDS = {
    "ground": (2, np.int64),  # colours of the upper and lower edge
    "kind": (MAX_SHAPES, np.int64),  # -1: no shape
    "colour": (MAX_SHAPES, np.int64),
    "shape": (4 * MAX_SHAPES, np.float32),  # x, y, radius and turn of each
    "sign": (5, np.int64),  # present, has a board, board colour, ink colour, number of characters
    "box": (4, np.float32),  # left, top and side of the first character, unit of the picture
    "glyph": (MAX_CHARACTERS, np.int64),
}


def palette() -> torch.Tensor:
    """[colours, 3] in 0..1."""
    return torch.tensor([RGB[name] for name in COLOURS], dtype=torch.float32) / 255


def load_atlas() -> torch.Tensor:
    """Ink coverage of every glyph, [glyphs, side, side] in 0..1."""
    stored = np.load(ATLAS_PATH)
    if str(stored["glyphs"]) != GLYPHS:
        raise ValueError(f"{ATLAS_PATH.name} holds other glyphs than world.GLYPHS; make it anew from a font")
    return torch.from_numpy(stored["atlas"]).float() / 255


def scene_arrays(scene: Scene) -> dict[str, np.ndarray]:
    row = {name: np.zeros(size, dtype) for name, (size, dtype) in FIELDS.items()}
    row["ground"][:] = [COLOURS.index(c) for c in scene.ground]
    row["kind"][:] = -1
    row["shape"][:] = np.tile([FAR, FAR, 1, 0], MAX_SHAPES)
    for i, s in enumerate(scene.shapes):
        row["kind"][i], row["colour"][i] = KINDS.index(s.kind), COLOURS.index(s.colour)
        row["shape"][4 * i : 4 * i + 4] = s.x, s.y, s.radius, s.turn
    row["box"][:] = FAR, FAR, 1, scene.unit
    if scene.sign:
        s, n = scene.sign, len(scene.sign.text)
        row["sign"][:] = 1, s.board is not None, COLOURS.index(s.board or "white"), COLOURS.index(s.ink), n
        row["box"][:3] = s.x - n * s.cell / 2, s.y - s.cell / 2, s.cell
        row["glyph"][:n] = [GLYPHS.index(c) for c in s.text]
    return row


def stack_scenes(scenes: list[Scene]) -> dict[str, torch.Tensor]:
    rows = [scene_arrays(scene) for scene in scenes]
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in FIELDS}


def shape_distance(x: torch.Tensor, y: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    """Signed distance to the border in units of the radius, negative inside. All three broadcast."""
    across, rho = x.abs(), (x * x + y * y + 1e-9).sqrt()
    square = torch.maximum(across, y.abs()) - 0.82
    triangle = torch.maximum(y - 0.62, across * 0.8660 - y * 0.5 - 0.5)
    fold = (torch.atan2(x, -y) + 4 * math.pi) % (2 * math.pi / 5)
    fold = torch.minimum(fold, 2 * math.pi / 5 - fold)
    edge_x, edge_y = 0.45 * math.sin(math.pi / 5), 0.45 * math.cos(math.pi / 5) - 1.0
    star = (-rho * fold.sin() * edge_y + (rho * fold.cos() - 1.0) * edge_x) / math.hypot(edge_x, edge_y)
    ring = (rho - 0.72).abs() - 0.23
    half, low = 0.70, y - 0.12
    lobe = ((across - half / 2) ** 2 + (low + half / 2) ** 2 + 1e-9).sqrt() - half / math.sqrt(2)
    heart = torch.minimum((across + low.abs() - half) / math.sqrt(2), lobe)
    diamond = (across + y.abs() * 0.62 - 0.62) / math.hypot(1, 0.62)
    cross = torch.minimum(torch.maximum(across - 0.95, y.abs() - 0.30), torch.maximum(across - 0.30, y.abs() - 0.95))
    distance = rho - 0.95
    for i, other in enumerate((square, triangle, star, ring, heart, diamond, cross), 1):
        distance = torch.where(kind == i, other, distance)
    return distance


def shape_cover(px, py, x, y, radius, turn, kind) -> torch.Tensor:
    """Coverage in 0..1 of a shape over pixel centres; all tensors broadcast."""
    dx, dy = (px - x) / radius, (py - y) / radius
    cos, sin = torch.cos(turn), torch.sin(turn)
    distance = shape_distance(dx * cos + dy * sin, dy * cos - dx * sin, kind) * radius
    return (0.5 - distance).clamp(0, 1) * (kind >= 0)


def board_cover(px, py, left, top, cell, count, unit) -> torch.Tensor:
    """Coverage of a rounded rectangle around the sign's characters."""
    corner = 10 * unit
    qx = (px - left - count * cell / 2).abs() - count * cell / 2 - 10 * unit + corner
    qy = (py - top - cell / 2).abs() - cell / 2 - 8 * unit + corner
    distance = (qx.clamp(min=0) ** 2 + qy.clamp(min=0) ** 2 + 1e-9).sqrt() + torch.maximum(qx, qy).clamp(max=0) - corner
    return (0.5 - distance).clamp(0, 1)


def ink_cover(px, py, left, top, cell, count, glyph: torch.Tensor, atlas: torch.Tensor) -> torch.Tensor:
    """Coverage of the sign's characters, read from the atlas with bilinear interpolation."""
    side = atlas.shape[-1]
    u, v = (px - left) / cell, (py - top) / cell
    slot = u.floor().clamp(0, MAX_CHARACTERS - 1)
    inside = (u >= 0) & (u < count) & (v >= 0) & (v < 1)
    gx, gy = (u - slot) * side - 0.5, v * side - 0.5
    character = torch.gather(glyph, 1, slot.long().flatten(1)).view(slot.shape)
    x0, y0 = gx.floor(), gy.floor()
    fx, fy = gx - x0, gy - y0
    flat, ink = atlas.reshape(-1), 0.0
    for ox, wx in ((0, 1 - fx), (1, fx)):
        for oy, wy in ((0, 1 - fy), (1, fy)):
            ix, iy = (x0 + ox).clamp(0, side - 1).long(), (y0 + oy).clamp(0, side - 1).long()
            ink = ink + wx * wy * flat[(character * side + iy) * side + ix]
    return ink * inside


def render(batch: dict[str, torch.Tensor], width: int, height: int, atlas: torch.Tensor) -> torch.Tensor:
    """Arrays of B scenes (FIELDS, stacked) → [B, 3, height, width] in -1..1 on the atlas's device."""
    colours, device = palette().to(atlas.device), atlas.device
    py = (torch.arange(height, device=device) + 0.5).view(1, -1, 1)
    px = (torch.arange(width, device=device) + 0.5).view(1, 1, -1)

    def ink_of(index: torch.Tensor) -> torch.Tensor:
        return colours[index][:, :, None, None]

    def over(image: torch.Tensor, colour: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
        return torch.lerp(image, ink_of(colour).expand_as(image), cover.unsqueeze(1))

    # one in eight of the height keeps the plain colour at either edge
    ramp = ((py / height - 0.125) / 0.75).clamp(0, 1).expand(-1, -1, width)
    image = ink_of(batch["ground"][:, 0]).expand(-1, -1, height, width)
    image = over(image, batch["ground"][:, 1], ramp)
    for i in range(MAX_SHAPES):
        x, y, radius, turn = (batch["shape"][:, 4 * i + j].view(-1, 1, 1) for j in range(4))
        cover = shape_cover(px, py, x, y, radius, turn, batch["kind"][:, i].view(-1, 1, 1))
        image = over(image, batch["colour"][:, i], cover)
    left, top, cell, unit = (batch["box"][:, j].view(-1, 1, 1) for j in range(4))
    present, has_board, count = (batch["sign"][:, j].view(-1, 1, 1) for j in (0, 1, 4))
    image = over(image, batch["sign"][:, 2], board_cover(px, py, left, top, cell, count, unit) * has_board)
    ink = ink_cover(px, py, left, top, cell, count, batch["glyph"], atlas) * present
    return over(image, batch["sign"][:, 3], ink) * 2 - 1


def detail_weight(batch: dict[str, torch.Tensor], width: int, height: int, text: float, shapes: float) -> torch.Tensor:
    """Loss weights [B, 1, height / 8, width / 8]: one, `text` more where characters stand, `shapes` more at shapes.

    Small things cover few latents and need as much attention as large ones, so they get up to twice as much.
    """
    device = batch["box"].device
    py = ((torch.arange(height // 8, device=device) + 0.5) * 8).view(1, -1, 1)
    px = ((torch.arange(width // 8, device=device) + 0.5) * 8).view(1, 1, -1)
    left, top, cell = (batch["box"][:, j].view(-1, 1, 1) for j in range(3))
    count = batch["sign"][:, 4].view(-1, 1, 1)
    inside = (px > left - 4) & (px < left + count * cell + 4) & (py > top - 4) & (py < top + cell + 4)
    weight = 1 + text * inside * (54 / cell).clamp(1, 2)
    for i in range(MAX_SHAPES):
        x, y, radius = (batch["shape"][:, 4 * i + j].view(-1, 1, 1) for j in range(3))
        near = torch.maximum((px - x).abs(), (py - y).abs()) < radius + 6
        weight = torch.maximum(weight, 1 + shapes * near * (36 / radius).clamp(0.5, 2))
    return weight.unsqueeze(1)
