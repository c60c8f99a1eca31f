"""The solver `adaptive`: the steps of `implicit`, each as long as the errors of those before allow."""

import math
from bisect import bisect_left

import torch

from .adams import PREDICTOR, Adams, descending

SAFETY = 0.9
SHORTEST, LONGEST = 0.25, 2.0  # of the step before
STRETCH = 0.1  # a step may be this much longer if that saves one


def adaptive(run, x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """As `implicit`, with as few evaluations as `run.tolerance` lets it and at most one for each given step.

    What the corrector changes is the local error of a step, for a whole batch that of its worst picture: all take the
    same steps, and the batch keeps its shape. What is left is divided into as few equal steps as keep that error at the
    tolerance, and one is made, but one at least as long as spreads the evaluations left evenly over the rest of the
    given levels. So the run ends exactly at the last level and within its budget, long steps at first leave evaluations
    for short ones later, and with tolerance 0 the given levels are taken one by one as by `implicit`. A step that errs
    by more is kept: to repeat it would cost an evaluation, and the one made corrects it already.

    levels [budget + 1] must descend to 0 or above. Errors noted: of each step but the last.
    """
    places = descending(levels)
    end, adams, length = places[-1], Adams(x, places[0]), 0.0
    for left in range(len(places) - 1, 0, -1):
        error = adams.correct(run.velocity(adams.x, levels.new_tensor(adams.level)))
        level = spread(places, adams.level, left)
        if error is not None:
            run.note(error)
            order = 1 if adams.steps == 1 else PREDICTOR
            length *= growth(run.measured(error, adams.x), run.tolerance, order)
            level = min(level, divided(adams.level, end, length))
        length = adams.level - level
        adams.predict(level)
        if level == end:
            break
    return adams.x


def growth(error: float, tolerance: float, order: int) -> float:
    """How much longer a step may be than one that erred so, by a formula of that order: error ~ length^(order + 1)."""
    if tolerance == 0:
        return SHORTEST
    if error == 0:
        return LONGEST
    return min(max(SAFETY * (tolerance / error) ** (1 / (order + 1)), SHORTEST), LONGEST)


def divided(level: float, end: float, length: float) -> float:
    """The end of the first of as few equal steps from level to end as are not longer than length, but for STRETCH."""
    steps = math.ceil((level - end) / length - STRETCH)
    return level - (level - end) / steps if steps > 1 else end


def spread(places: list[float], level: float, steps: int) -> float:
    """The end of the first of that many steps to the last of the given places, as dense among them everywhere."""
    after = bisect_left(places, -level, 1, key=lambda place: -place)
    at = after - (level - places[after]) / (places[after - 1] - places[after])
    return between(places, at + (len(places) - 1 - at) / steps)


def between(places: list[float], at: float) -> float:
    """The level at a number counted in places, on straight lines from each place to the next."""
    before = min(int(at), len(places) - 2)
    share = at - before
    return places[before + 1] if share == 1 else places[before] + share * (places[before + 1] - places[before])
