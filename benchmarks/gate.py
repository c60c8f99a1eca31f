"""Whether a contestant draws the right picture: its distance from the one that the host draws in fp32.

The distance of two pictures is |a - exact| / |exact - mean(exact)|: 0 for the same, about 1.4 for unrelated ones.
"""

import dataclasses
import math
import sys
from collections.abc import Iterable

import numpy as np

# A 16-bit contestant may be twice as far away as the host in 16 bits, which is measured. The quantised ones have fixed
# bounds: eight steps add up the error that a layer's rounding makes, and a picture of another prompt is far beyond.
QUANTISED = {"fp8": 0.35, "int4-fp8": 0.5, "int4": 0.5, "int8": 0.35, "w4a8": 0.5}
FACTOR = 2
# Another measure: the error of one evaluation of the full-size denoiser with the random weights of denoise.py, as an
# H100 had it (fp8 and int4-fp8: results/denoise_h100.json, where 512 and 1024 pixels differ by 1 %; int4: about 0.18,
# before it had a row there). The numbers are the same each time and only the order of sums differs, so a quarter more
# is no rounding but a fault.
MEASURED_ONCE = {"fp8": 0.085, "int4-fp8": 0.195, "int4": 0.18}
ONE_EVALUATION = {precision: round(1.25 * error, 4) for precision, error in MEASURED_ONCE.items()}
GREY_LEVEL = 1.0  # files hold whole grey levels, so one in every pixel is no error


def insist(rows: Iterable[dict]) -> None:
    """Leave the program with status 1 when a row's gate stayed shut: its times are missing."""
    if shut := [row for row in rows if not row.get("gate", True)]:
        sys.exit("\n".join(["Beyond their bounds, and not timed:", *map(str, shut)]))


def distance(picture: np.ndarray, exact: np.ndarray) -> float:
    """Relative error of uint8 pictures of one shape [height, width, 3]; infinite where `exact` is all one grey."""
    contrast = _contrast(exact)
    return float(np.linalg.norm(picture.astype(np.float64) - exact) / contrast) if contrast else float("inf")


def _contrast(picture: np.ndarray) -> float:
    return float(np.linalg.norm(picture - picture.mean(dtype=np.float64)))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`bound` is None where there is nothing to measure against."""

    error: float
    bound: float | None
    held: bool


@dataclasses.dataclass
class Gate:
    """exact: the reference's pictures by their side; unrelated: the distance of two that show different prompts.

    A bound is never more than half of `unrelated`: a gate that cannot tell one prompt from another stays shut.
    """

    exact: dict[int, np.ndarray]
    unrelated: float
    sixteen_bit: dict[int, float] = dataclasses.field(default_factory=dict)  # by side, how far 16 bits lead away

    def judge(self, precision: str, yardstick: bool, picture: np.ndarray) -> Verdict:
        """Hold a picture against the exact one of its size; a yardstick's first picture of a size sets the measure."""
        size = picture.shape[0]
        error = distance(picture, self.exact[size])
        if yardstick:
            self.sixteen_bit.setdefault(size, error)
        bound = self._bound(precision, size)
        return Verdict(error, bound, math.isfinite(error) and bound is not None and error <= bound)

    def _bound(self, precision: str, size: int) -> float | None:
        allowed = QUANTISED.get(precision)
        if allowed is None and size in self.sixteen_bit:
            exact = self.exact[size]
            level = GREY_LEVEL * exact.size**0.5 / _contrast(exact) if _contrast(exact) else float("inf")
            allowed = max(FACTOR * self.sixteen_bit[size], level)
        return None if allowed is None else min(allowed, self.unrelated / 2)
