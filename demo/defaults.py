"""What is drawn where the words leave something open: one sensible choice each.

Eight unguided steps of so small a model blend choices that are equally likely, so there is only one.
"""

from dataclasses import replace

from .world import (
    RADIUS,
    SHAPE_COLOURS,
    Scene,
    Shape,
    Sign,
    anchor,
    contrast,
    ground_contrast,
    overlaps,
    sign_box,
    sign_centre,
)

KIND_COLOUR = {
    "circle": "red",
    "square": "blue",
    "triangle": "green",
    "star": "yellow",
    "ring": "orange",
    "heart": "red",
    "diamond": "purple",
    "cross": "green",
}
GROUND = {
    "red": "beige",
    "orange": "white",
    "yellow": "sky blue",
    "green": "white",
    "blue": "beige",
    "purple": "pink",
    "white": "sky blue",
    "black": "mint",
}
PLACES_ALONE = {1: ["center"], 2: ["left", "right"], 3: ["left", "center", "right"]}
PLACES_BY_SIGN = {1: ["bottom", "top"], 2: ["bottom left", "bottom right", "top left", "top right"]}
ALL_PLACES = ["center", "left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right"]


def default_ground(scene: Scene, said: Scene) -> tuple[str, str]:
    """By the first colour that is named, or else is drawn; readable against every other."""
    named = [s.colour for s in said.shapes if s.colour] or [KIND_COLOUR[s.kind] for s in said.shapes]
    if said.sign and not named:
        named = [said.sign.board or (said.sign.ink if scene.sign.board is None else None) or "white"]
    wanted = GROUND[named[0]]
    inks = named[1:] + ([said.sign.ink] if said.sign and said.sign.ink and not scene.sign.board else [])
    for ground in (wanted, "white", "sky blue", "beige", "navy"):
        if all(contrast(c, ground) > 0.4 for c in inks):
            return ground, ground
    return wanted, wanted


def readable(colours: list[str], against: tuple[str, ...]) -> str:
    """The first colour that stands out from all of `against`, or the one that does so most."""

    def least(colour: str) -> float:
        return min(contrast(colour, other) for other in against)

    return next((c for c in colours if least(c) > 0.55), max(SHAPE_COLOURS, key=least))


def settle_sign(scene: Scene, said: Sign, with_shapes: bool) -> Sign:
    sign, ground = scene.sign, scene.ground
    board, ink = sign.board, said.ink
    if board and not said.board:
        board = readable(["white", "yellow", "black", "red"], (*ground, ink) if ink else ground)
    ink = ink or readable(["black", "white", "yellow"], (board,) if board else ground)
    place = said.place or ("top" if with_shapes else "center")
    x0, y0 = sign_centre(sign.place, scene.width, scene.height)
    x1, y1 = sign_centre(place, scene.width, scene.height)
    return replace(sign, board=board, ink=ink, place=place, x=sign.x - x0 + x1, y=sign.y - y0 + y1)


def settle_shape(scene: Scene, shape: Shape, said: Shape, size: str, place: str) -> Shape:
    """The same shape, with its own jitter, at another place and of another size."""
    x0, y0 = anchor(shape.place, shape.size, scene.width, scene.height)
    x1, y1 = anchor(place, size, scene.width, scene.height)
    colour = said.colour
    if not colour:
        fitting = [KIND_COLOUR[said.kind], "blue", "yellow", "red"]
        colour = next((c for c in fitting if ground_contrast(c, scene.ground) > 0.35), "black")
    return replace(
        shape,
        colour=colour,
        size=size,
        place=place,
        x=shape.x - x0 + x1,
        y=shape.y - y0 + y1,
        radius=shape.radius * RADIUS[size] / RADIUS[shape.size],
    )


def place_shapes(scene: Scene, said: Scene) -> list[tuple[str, str]] | None:
    """Size and place of every shape: as said, else the first free default; None if there is no room."""
    count = len(said.shapes)
    defaults = PLACES_BY_SIGN.get(count, []) if scene.sign else PLACES_ALONE[count]
    if said.relation:
        defaults = {"above": ["top", "bottom"], "left of": ["left", "right"]}[said.relation]
    boxes = [sign_box(scene.sign, scene.unit)] if scene.sign else []
    chosen: list[tuple[str, str] | None] = [None] * count
    for index in sorted(range(count), key=lambda i: (said.shapes[i].place is None, i)):
        shape = said.shapes[index]
        size = shape.size or ("small" if count == 3 else "large")
        places = [shape.place] if shape.place else [*defaults, *ALL_PLACES]
        options = [(s, p) for s in ([size] if shape.size else [size, "small"]) for p in places]
        for option in options:
            x, y = anchor(option[1], option[0], scene.width, scene.height)
            reach = RADIUS[option[0]] * scene.unit
            if not overlaps(x, y, reach + 3, boxes):
                boxes.append((x - reach, y - reach, x + reach, y + reach))
                chosen[index] = option
                break
        else:
            return None
    return chosen


def settle(scene: Scene, said: Scene) -> Scene | None:
    """The scene that is drawn for what was said; None if the defaults leave no room for it."""
    drawn = replace(scene, shapes=list(scene.shapes))
    if said.ground is None:
        drawn.ground = default_ground(scene, said)
    if scene.sign:
        drawn.sign = settle_sign(drawn, said.sign, bool(scene.shapes))
    if scene.stacked:
        place = said.shapes[0].place or "center"
        below = settle_shape(drawn, scene.shapes[0], said.shapes[0], "large", place)
        above = settle_shape(drawn, scene.shapes[1], said.shapes[1], "small", place)
        drawn.shapes = [
            below,
            replace(
                above,
                x=below.x + scene.shapes[1].x - scene.shapes[0].x,
                y=below.y + scene.shapes[1].y - scene.shapes[0].y,
            ),
        ]
        return drawn
    if scene.shapes:
        chosen = place_shapes(drawn, said)
        if chosen is None:
            return None
        drawn.shapes = [
            settle_shape(drawn, shape, words, size, place)
            for shape, words, (size, place) in zip(scene.shapes, said.shapes, chosen, strict=True)
        ]
    return drawn
