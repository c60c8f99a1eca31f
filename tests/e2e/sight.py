"""What a picture of the demo shows of the saved workflow's prompt."""

import numpy as np
import torch

from zimage_turbo.demo.judge import Verdict, judge
from zimage_turbo.demo.world import Scene, Shape, Sign


def verdict(picture: np.ndarray) -> Verdict:
    """What is right, item by item, in a picture uint8 [height, width, 3]."""
    height, width, _ = picture.shape
    scene = Scene(
        width,
        height,
        ground=("sky blue", "sky blue"),
        shapes=[Shape("circle", "red", "large", "top")],
        sign=Sign("你好", ink="blue", board="white", place="bottom"),
    )
    return judge(torch.from_numpy(picture.copy()).float() / 255, scene)


def shows_the_saved_prompt(picture: np.ndarray) -> bool:
    """Every item is right, the two characters included."""
    return verdict(picture).all_right
