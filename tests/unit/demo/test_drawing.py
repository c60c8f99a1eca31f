"""The demo draws what it is told, through the pack's own nodes, as well as benchmarks/results/drawing.json says.

A sample of the prompts of benchmarks/drawing.py. The bound is what a checkpoint at the measured rate misses with a
chance below one in a thousand, so that a regression of loader, text encoder, sampler or VAE is seen.
"""

import json
import math

import pytest

from zimage_turbo.demo.evaluate import score
from zimage_turbo.demo.prompts import SETS
from zimage_turbo.tests.drawing import node_draw

COUNT = 40
KINDS = ("shapes", "characters", "items")


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


@pytest.mark.parametrize("name", list(SETS))
def test_held_out_prompts(draw, pack, name):
    measured = json.loads((pack / "benchmarks" / "results" / "drawing.json").read_text(encoding="utf-8"))["sets"][name]
    summary, _ = score(draw, SETS[name](COUNT))
    for kind in KINDS:
        right, total = summary[kind]["right"], summary[kind]["total"]
        assert total >= COUNT / 2, f"too few {kind} to judge"
        assert right >= fewest(total, measured[kind]["rate"]), f"{kind} of the {name} prompts: {right} of {total}"
