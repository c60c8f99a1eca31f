"""What the demo model can draw: colours, shapes, places and signs, and how a scene of them is laid out.

Lengths are in pixels. A picture's unit is a 256th of its shorter side, so that layouts scale with the picture.
"""

import math
import random
import zlib
from dataclasses import dataclass, field

RGB = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (45, 160, 70),
    "blue": (45, 95, 215),
    "purple": (135, 60, 185),
    "white": (250, 250, 250),
    "black": (25, 25, 25),
    "gray": (150, 150, 150),
    "pink": (250, 180, 200),
    "sky blue": (150, 210, 245),
    "beige": (235, 220, 185),
    "mint": (170, 230, 195),
    "navy": (25, 35, 85),
}
COLOURS = tuple(RGB)
SHAPE_COLOURS = COLOURS[:8]
GROUND_WEIGHTS = {"white": 5, "red": 0.5, "orange": 0.5, "yellow": 0.5, "green": 0.7, "blue": 1, "purple": 0.5}
KINDS = ("circle", "square", "triangle", "star", "ring", "heart", "diamond", "cross")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
RADIUS = {"small": 29, "large": 52}
MAX_SHAPES, MAX_CHARACTERS = 3, 8

HANZI = (
    "一二三四五六七八九十百千万日月山水火木金土天地人口大小上下左右中东西南北春夏秋冬风雨雪云你我他好爱家国王子女"
    "父母学生老师手心目耳马牛羊鱼鸟虎龙花草树林车门开关茶米饭书店福喜乐新年快出入来去早晚安海河江石电话世界明星光梦美"
    "红黄蓝绿黑白"
)
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
GLYPHS = HANZI + LETTERS + DIGITS
# Smaller characters than these are lost in latents of eight pixels.
SMALLEST_HANZI, SMALLEST_LATIN = 34.0, 24.0
WORDS_ZH = (  # noqa: SIM905 - a list of words reads best as words
    "你好 世界 中国 新年快乐 火车 开门 早安 晚安 花店 书店 大学 老师 学生 天地 山水 明星 电话 春天 冬天 白云 爱国 日月 "
    "马上 出口 入口 茶 福 龙 美国 红茶 你好世界 天天快乐 大家早安 新年好 花好月年 东南西北 春夏秋冬"
).split()
WORDS_EN = (  # noqa: SIM905
    "OPEN STOP GO HI OK YES NO CAFE TAXI ZOO BOOK LOVE HOME EXIT SALE HELP WIN SUN SEA FISH STAR ZIT NEW BUS CAR FREE "
    "GOOD TEA ICE RED HELLO WORLD WELCOME CLOSED SCHOOL COFFEE PIZZA MUSIC HAPPY SUMMER TURBO IMAGE HOTEL PARK SHOP "
    "CHINA DRAGON LIBRARY PARKING BIRTHDAY"
).split()


@dataclass
class Shape:
    """A shape as drawn; as something said, None stands for what the words leave open."""

    kind: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0
    turn: float = 0.0


@dataclass
class Sign:
    """Characters, on a board or straight on the background. `board` is None where there is none (or none is said)."""

    text: str
    ink: str | None = None
    board: str | None = None
    place: str | None = None
    x: float = 0.0
    y: float = 0.0
    cell: float = 0.0


@dataclass
class Scene:
    """A picture's content. `ground` holds the colours of the upper and the lower edge, or is None if not said.

    `stacked`: the second shape lies on the first. `relation`: how the first shape lies to the second
    ("above", "left of"), where the words say so.
    """

    width: int = 256
    height: int = 256
    ground: tuple[str, str] | None = ("white", "white")
    shapes: list[Shape] = field(default_factory=list)
    sign: Sign | None = None
    stacked: bool = False
    relation: str | None = None

    @property
    def unit(self) -> float:
        return min(self.width, self.height) / 256


def contrast(a: str, b: str) -> float:
    return math.dist(RGB[a], RGB[b]) / 255


def held_out(text: str) -> bool:
    """One twentieth of all texts, the same on every machine: training shows none of them."""
    return zlib.crc32(text.encode()) % 20 == 0


def anchor(place: str, size: str, width: int, height: int) -> tuple[float, float]:
    """The point at which a shape of this size stands when it is put at this place."""
    near = (62 if size == "large" else 46) * min(width, height) / 256
    x = near if "left" in place else width - near if "right" in place else width / 2
    y = near if "top" in place else height - near if "bottom" in place else height / 2
    return x, y


def sign_cell(text: str, width: int, height: int) -> float:
    """The side of the square that one character of a sign takes."""
    tallest = {1: 84, 2: 76}.get(len(text), 66) * min(width, height) / 256
    return min(tallest, 0.845 * width / len(text))


def sign_centre(place: str, width: int, height: int) -> tuple[float, float]:
    edge = 66 * min(width, height) / 256
    return width / 2, {"top": edge, "center": height / 2, "bottom": height - edge}[place]


def fits(text: str, width: int, height: int) -> bool:
    smallest = SMALLEST_HANZI if any(c in HANZI for c in text) else SMALLEST_LATIN
    return len(text) <= MAX_CHARACTERS and sign_cell(text, width, height) >= smallest


def sample_text(rng: random.Random, width: int, height: int, test: bool) -> str:
    """A sign's text: single characters are the same in training and test, longer texts are never shared."""
    while True:
        draw, test_words = rng.random(), rng.random() < 0.5 or not test
        if draw < 0.42:
            text = "".join(rng.choices(HANZI, k=rng.choices(range(1, 7), [20, 30, 18, 18, 8, 6])[0]))
        elif draw < 0.54 and test_words:
            text = rng.choice(WORDS_ZH)
        elif draw < 0.72:
            text = "".join(rng.choices(LETTERS, k=rng.choices(range(1, 9), [18, 20, 18, 18, 10, 8, 4, 4])[0]))
        elif draw < 0.88 and test_words:
            text = rng.choice(WORDS_EN)
        else:
            text = "".join(rng.choices(DIGITS, k=rng.choices(range(1, 7), [20, 25, 20, 20, 8, 7])[0]))
        if fits(text, width, height) and (len(text) == 1 or held_out(text) == test):
            return text


def sample_ground(rng: random.Random) -> tuple[str, str]:
    weights = [GROUND_WEIGHTS.get(name, 1.5) for name in COLOURS]
    first, second = rng.choices(COLOURS, weights, k=2)
    return (first, second) if rng.random() < 0.28 else (first, first)


def sample_sign(rng: random.Random, scene: Scene, with_shapes: bool, test: bool) -> Sign:
    width, height, unit = scene.width, scene.height, scene.unit
    distance = {c: ground_contrast(c, scene.ground) for c in SHAPE_COLOURS}
    board = None
    if scene.ground[0] != scene.ground[1] or rng.random() < 0.7:
        usable = [c for c in SHAPE_COLOURS if distance[c] > 0.33] or ["yellow"]
        board = "white" if "white" in usable and rng.random() < 0.45 else rng.choice(usable)
    ink = rng.choice([c for c in SHAPE_COLOURS if contrast(c, board or scene.ground[0]) > 0.55])
    text = sample_text(rng, width, height, test)
    place = rng.choices(["top", "center", "bottom"], [2, 1, 2] if with_shapes else [1, 2, 1])[0]
    x, y = sign_centre(place, width, height)
    return Sign(
        text,
        ink,
        board,
        place,
        x + rng.uniform(-4, 4) * unit,
        y + rng.uniform(-5, 5) * unit,
        sign_cell(text, width, height) * rng.uniform(0.96, 1.02),
    )


def sign_box(sign: Sign, unit: float) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the board."""
    across, down = len(sign.text) * sign.cell / 2 + 10 * unit, sign.cell / 2 + 8 * unit
    return sign.x - across, sign.y - down, sign.x + across, sign.y + down


def place_shape(rng: random.Random, scene: Scene, kind: str, colour: str, size: str, place: str) -> Shape:
    x, y = anchor(place, size, scene.width, scene.height)
    jitter = 4 * scene.unit
    return Shape(
        kind,
        colour,
        size,
        place,
        x + rng.uniform(-jitter, jitter),
        y + rng.uniform(-jitter, jitter),
        RADIUS[size] * scene.unit * rng.uniform(0.95, 1.05),
        rng.uniform(-0.1, 0.1),
    )


def overlaps(x: float, y: float, reach: float, boxes: list[tuple]) -> bool:
    return any(
        x + reach > left and x - reach < right and y + reach > top and y - reach < bottom
        for left, top, right, bottom in boxes
    )


def ground_contrast(colour: str, ground: tuple[str, str]) -> float:
    """The least distance of a colour from any that the background passes through."""
    first, second = (RGB[name] for name in ground)
    blends = ([a + (b - a) * step / 8 for a, b in zip(first, second, strict=True)] for step in range(9))
    return min(math.dist(RGB[colour], blend) for blend in blends) / 255


def visible_colours(scene: Scene, taken: list[str]) -> list[str]:
    far = {c: ground_contrast(c, scene.ground) for c in SHAPE_COLOURS}
    usable = [c for c in SHAPE_COLOURS if far[c] > 0.35 and all(contrast(c, t) > 0.3 for t in taken)]
    return usable or [max(far, key=far.get)]


def add_shapes(rng: random.Random, scene: Scene, count: int) -> None:
    """Put up to `count` shapes where there is room for them."""
    boxes = [sign_box(scene.sign, scene.unit)] if scene.sign else []
    alike = count > 1 and not scene.sign and rng.random() < 0.25
    for _ in range(40):
        if len(scene.shapes) == count:
            return
        size = rng.choice(["small", "large"])
        alone = count == 1 and not scene.sign
        place = "center" if alone and rng.random() < 0.4 else rng.choice(PLACES)
        x, y = anchor(place, size, scene.width, scene.height)
        radius = RADIUS[size] * scene.unit
        if overlaps(x, y, radius + 3, boxes):
            continue
        twin = scene.shapes[0] if alike and scene.shapes else None
        kind = twin.kind if twin else rng.choice(KINDS)
        colours = visible_colours(scene, [] if rng.random() < 0.1 else [s.colour for s in scene.shapes])
        colour = twin.colour if twin else rng.choice(colours)
        if twin and twin.size != size:
            continue
        scene.shapes.append(place_shape(rng, scene, kind, colour, size, place))
        boxes.append((x - radius, y - radius, x + radius, y + radius))


def add_stack(rng: random.Random, scene: Scene) -> None:
    """A large shape with a small one in front of it."""
    place = "center" if rng.random() < 0.4 else rng.choice(PLACES)
    below = place_shape(rng, scene, rng.choice(KINDS), rng.choice(visible_colours(scene, [])), "large", place)
    colour = rng.choice(visible_colours(scene, [below.colour]))
    above = place_shape(rng, scene, rng.choice(KINDS), colour, "small", place)
    above.x, above.y = below.x + rng.uniform(-3, 3) * scene.unit, below.y + rng.uniform(-3, 3) * scene.unit
    scene.shapes, scene.stacked = [below, above], True


def sample_scene(rng: random.Random, width: int = 256, height: int = 256, test: bool = False) -> Scene:
    """A complete scene. With `test`, sign texts of two characters or more come from the held-out ones."""
    scene = Scene(width, height, sample_ground(rng))
    draw = rng.random()
    if draw < 0.04:
        return scene
    if draw < 0.62:
        count = rng.choices([0, 1, 2], [0.5, 0.3, 0.2])[0]
        scene.sign = sample_sign(rng, scene, count > 0, test)
        add_shapes(rng, scene, count)
    elif draw < 0.68:
        add_stack(rng, scene)
    else:
        add_shapes(rng, scene, rng.choices([1, 2, 3], [0.45, 0.35, 0.2])[0])
    return scene
