"""Sets of held-out prompts: none of their captions, and none of their longer sign texts, is ever shown in training."""

import random
from dataclasses import dataclass, replace

from .captions import caption
from .dataset import SIDES
from .world import Scene, held_out, sample_scene


@dataclass(frozen=True)
class Prompt:
    """`said` holds the picture's size and what the words promise; what they leave open is None."""

    text: str
    said: Scene
    seed: int


def things(said: Scene) -> int:
    return len(said.shapes) + (said.sign is not None) + (said.ground is not None)


def held_out_prompt(rng: random.Random, size: tuple[int, int], drop: float, most_things: int) -> Prompt:
    while True:
        scene = sample_scene(rng, *size, test=True)
        text, said = caption(rng, scene, drop)
        if held_out(text) and things(said) <= most_things:
            return Prompt(text, replace(said, width=size[0], height=size[1]), rng.randrange(2**31))


def full_prompts(count: int, seed: int = 1) -> list[Prompt]:
    """Everything is said: every shape's kind, colour, size and place, signs likewise, and the background."""
    rng = random.Random(seed)
    return [held_out_prompt(rng, (256, 256), 0.0, 99) for _ in range(count)]


def short_prompts(count: int, seed: int = 2) -> list[Prompt]:
    """One or two things are named, with few of their attributes."""
    rng = random.Random(seed)
    return [held_out_prompt(rng, (256, 256), 0.9, 2) for _ in range(count)]


def sized_prompts(count: int, seed: int = 3) -> list[Prompt]:
    """Everything is said, and both sides are drawn from 192 to 384 in steps of 16."""
    rng = random.Random(seed)
    return [held_out_prompt(rng, (rng.choice(SIDES), rng.choice(SIDES)), 0.0, 99) for _ in range(count)]


SETS = {"full": full_prompts, "short": short_prompts, "sizes": sized_prompts}

# Shown in grid.png as drawn with seeds 0, 1, 2 …; none is left out.
SHOWN = (
    "a red circle",
    "一颗黄色的星星",
    "a sign that says OPEN",
    "blue background",
    "写着“你好”的牌子",
    "two purple hearts",
    'a white sign in the center that says "HELLO" in red, navy background',
    "上方的白色牌子上写着红色文字“新年快乐”，天蓝色背景",
    'the black text "ZIT"',
    "中间有一个紫色的大星形，粉色背景",
    "a small red star on top of a large blue circle in the center, white background",
    "red circle and blue square",
    "Draw a green triangle",
    "一个红色的圆和一个蓝色的方块",
    "a large orange ring at the top left, a large green cross at the bottom right",
    'a yellow sign at the top with the black text "火车", a large blue diamond at the bottom, on a white background',
    "左边有一个红色的小三角形，右边有一个绿色的小正方形，米色背景",
    'a white sign at the bottom that says "2026" in blue, a large red circle at the top, mint background',
    "写着“春夏秋冬”的红色牌子",
    "a donut",
    "on a gradient from orange to purple",
    "a red heart above a yellow star",
    'a black sign saying "WELCOME" in yellow',
    "左上角一个红色爱心，右下角一个蓝色菱形，背景从白色渐变到天蓝色",
    "三个绿色的方块",
    'a blue sign that says "天地人" in white',
    "a box",
    '"TURBO" in blue, beige background',
    "紫色的大心形，黄色背景",
    "一块黄色牌子上写着红色文字“福”，黑色背景",
)
