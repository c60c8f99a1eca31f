"""The demo draws what it is told, through the pack's own nodes.

A sample of the held-out prompts that benchmarks/drawing.py judges in full; the bound is what a checkpoint at the
required rate misses with a chance below one in a thousand.
"""

import math

import pytest

from zimage_turbo.demo.evaluate import score
from zimage_turbo.demo.prompts import SETS
from zimage_turbo.tests.drawing import node_draw

COUNT = 40
REQUIRED = {
    "full": {"shapes": 0.98, "characters": 0.97},
    "short": {"items": 0.95},
    "sizes": {"shapes": 0.95, "characters": 0.90},
}


def fewest(total: int, rate: float, chance: float = 1e-3) -> int:
    """The largest k with P(right < k) <= chance for a binomial of this rate."""
    below = 0.0
    for right in range(total + 1):
        below += math.comb(total, right) * rate**right * (1 - rate) ** (total - right)
        if below > chance:
            return right
    return total


@pytest.fixture(scope="module")
def draw():
    return node_draw()


@pytest.mark.parametrize("name", list(REQUIRED))
def test_held_out_prompts(draw, name):
    summary, _ = score(draw, SETS[name](COUNT))
    for kind, rate in REQUIRED[name].items():
        counts = summary[kind]
        assert counts["total"] >= COUNT / 2, f"too few {kind} to judge"
        assert counts["right"] >= fewest(counts["total"], rate), f"{kind} of the {name} prompts: {counts}"
