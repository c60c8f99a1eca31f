"""What a picture of the demo shows of the saved workflows' prompts."""

import numpy as np
import torch

from zimage_turbo.demo.judge import Verdict, judge
from zimage_turbo.demo.world import Scene, Shape, Sign


def verdict(picture: np.ndarray) -> Verdict:
    """What is right, item by item, in a picture uint8 [height, width, 3]."""
    shape, sign = Shape("circle", "red", "large", "top"), Sign("你好", ink="blue", board="white", place="bottom")
    return _judged(picture, "sky blue", shape, sign)


def shows_the_saved_prompt(picture: np.ndarray) -> bool:
    """Every item is right, the two characters included."""
    return verdict(picture).all_right


def shows_the_bilingual_prompt(picture: np.ndarray) -> bool:
    """Every item of the workflow with two languages is right, the four characters included."""
    shape, sign = Shape("star", "orange", "large", "top"), Sign("新年快乐", ink="red", board="white", place="bottom")
    return _judged(picture, "navy", shape, sign).all_right


def _judged(picture: np.ndarray, ground: str, shape: Shape, sign: Sign) -> Verdict:
    height, width, _ = picture.shape
    scene = Scene(width, height, ground=(ground, ground), shapes=[shape], sign=sign)
    return judge(torch.from_numpy(picture.copy()).float() / 255, scene)
