"""Adams's formulas for steps of any length: what integrates an ODE from velocities met on the way."""

import math
from itertools import pairwise

import torch

PREDICTOR, CORRECTOR = 2, 3  # velocities that each interpolates
Point = tuple[float, torch.Tensor]  # a level, and what belongs to it


class Adams:
    """x on its way along dx/dlevel = velocity: predicted from level to level, corrected by what is found there.

    The Adams-Bashforth formula of two velocities, the one here and the one before, predicts a step. The velocity at the
    predicted place corrects that same step by the Adams-Moulton formula of three, and predicts the next: one evaluation
    a step with the accuracy of an implicit formula (PEC mode; E. Hairer, S. P. Nørsett, G. Wanner, Solving Ordinary
    Differential Equations I, section III.1). The first step has one velocity less in both. The order is 3.
    """

    def __init__(self, x: torch.Tensor, level: float):
        self.x, self.level = x, level
        self.steps = 0
        self._origin: Point | None = None
        self._velocities: list[Point] = []

    def correct(self, velocity: torch.Tensor) -> torch.Tensor | None:
        """Takes the velocity found here and corrects the step that led here.

        Returns the largest RMS [] by which the correction moves one of the batch, None at the start: the local error of
        the prediction, and more than that of the corrected step.
        """
        self._velocities = [(self.level, velocity), *self._velocities][:CORRECTOR]
        if self._origin is None:
            return None
        start, x = self._origin
        corrected = x + integral(self._velocities, start, self.level)
        error = largest_rms(corrected - self.x)
        self.x = corrected
        return error

    def predict(self, level: float) -> None:
        """Goes to another level, by the velocities found so far."""
        self.steps += 1
        self._origin = self.level, self.x
        self.x = self.x + integral(self._velocities[:PREDICTOR], self.level, level)
        self.level = level


def integral(points: list[Point], start: float, end: float) -> torch.Tensor:
    """∫ from start to end of the polynomial through up to four points (level, value)."""
    shares = weights([place for place, _ in points], start, end)
    first, *others = (share * value for share, (_, value) in zip(shares, points, strict=True))
    return sum(others, first)


def weights(places: list[float], start: float, end: float) -> list[float]:
    """What values at up to four different places count in the integral of the polynomial through them."""
    middle, half = (start + end) / 2, (end - start) / 2
    offset = half / math.sqrt(3)  # Gauss's rule of two points is exact up to cubic polynomials

    def basis(place: float, at: float) -> float:
        return math.prod((at - other) / (place - other) for other in places if other != place)

    return [half * (basis(place, middle - offset) + basis(place, middle + offset)) for place in places]


def largest_rms(x: torch.Tensor) -> torch.Tensor:
    """Of the root mean squares of the rows of x [batch, …], the largest: []."""
    return x.flatten(1).square().mean(1).sqrt().max()


def descending(levels: torch.Tensor) -> list[float]:
    """Levels as numbers. Raises ValueError unless each is below the one before and the last is at least 0."""
    places = levels.tolist()
    for number, (before, after) in enumerate(pairwise(places), start=1):
        if not (before > after >= 0):
            raise ValueError(
                f"sigmas must descend and end at 0 or above, but number {number} is {after:.6g} after {before:.6g}. "
                "Connect the SIGMAS of Z-Image-Turbo Sigmas, or choose the solver 'official'."
            )
    return places
