"""Adams's formulas and the solver `implicit`, against polynomials and a flow that is known."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zimage_turbo.engine import adams, ode
from zimage_turbo.tests.flows import gaussian

PLACES = st.lists(st.integers(-20, 20), min_size=1, max_size=4, unique=True).map(
    lambda numbers: [number / 10 for number in numbers]
)


@given(PLACES, st.integers(-20, 20), st.integers(-20, 20), st.randoms(use_true_random=False))
def test_polynomials_are_integrated_exactly(places, start, end, random):
    polynomial = np.polynomial.Polynomial([random.uniform(-1, 1) for _ in places])
    weights = adams.weights(places, start / 10, end / 10)
    ours = sum(weight * polynomial(place) for weight, place in zip(weights, places, strict=True))
    integral = polynomial.integ()
    assert ours == pytest.approx(integral(end / 10) - integral(start / 10), abs=1e-7)


@pytest.mark.parametrize(
    ("places", "end", "expected"),
    [
        ([0.0, -1.0], 1.0, [3 / 2, -1 / 2]),  # Adams-Bashforth 2
        ([1.0, 0.0], 1.0, [1 / 2, 1 / 2]),  # the trapezoidal rule
        ([1.0, 0.0, -1.0], 1.0, [5 / 12, 8 / 12, -1 / 12]),  # Adams-Moulton 3
    ],
)
def test_even_steps_have_the_weights_of_the_textbooks(places, end, expected):
    assert adams.weights(places, 0.0, end) == pytest.approx(expected)


def test_implicit_has_order_three():
    errors = gaussian.errors("implicit", (160, 320, 640))
    slopes = [np.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes == pytest.approx([3, 3], abs=0.25)


def test_implicit_has_order_three_on_uneven_steps():
    """Every second step is twice as long."""

    def levels(pairs: int) -> torch.Tensor:
        even = torch.linspace(1, 0, 3 * pairs + 1, dtype=torch.float64)
        return torch.cat((torch.stack((even[:-1:3], even[2::3]), 1).flatten(), even[-1:]))

    errors = [gaussian.error("implicit", levels(pairs)) for pairs in (80, 160, 320)]
    slopes = [np.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes == pytest.approx([3, 3], abs=0.25)


@pytest.mark.parametrize("steps", [6, 8, 12, 20])
def test_implicit_errs_less_than_official_with_as_many_evaluations(steps):
    levels = gaussian.levels(steps)
    assert gaussian.error("implicit", levels) < 0.7 * gaussian.error("official", levels)


def test_a_straight_path_is_followed_exactly():
    x, clean = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    end, report = ode.solve("implicit", lambda x, sigma: clean, x, ode.sigmas())
    assert torch.allclose(end, clean, atol=1e-6)
    assert max(report.errors) < 1e-6


def test_the_first_step_is_corrected_by_the_trapezoidal_rule():
    levels, x = torch.tensor([1.0, 0.6, 0.2]), torch.randn(1, 2, 2, 2)
    first = x - torch.sin(x)
    predicted = x - 0.4 * first
    second = (predicted - torch.sin(predicted)) / 0.6
    corrected = x - 0.2 * (first + second)
    slope = (first - second) / 0.4  # of the velocity, for the step to 0.2
    end, report = ode.solve("implicit", lambda x, sigma: torch.sin(x), x, levels)
    assert torch.allclose(end, corrected - 0.4 * (second - slope * 0.2), atol=1e-6)
    assert report.errors == pytest.approx([(corrected - predicted).square().mean().sqrt().item()], rel=1e-4)


def test_the_estimate_is_that_of_the_worst_picture():
    x = torch.randn(2, 4, 3, 3)
    straight = torch.tensor([0.0, 1.0]).view(-1, 1, 1, 1)  # the first picture's path is straight, the second's bends
    _, both = ode.solve("implicit", lambda x, sigma: torch.sin(3 * x) * straight, x, ode.sigmas())
    _, bent = ode.solve("implicit", lambda x, sigma: torch.sin(3 * x), x[1:], ode.sigmas())
    assert both.errors == pytest.approx(bent.errors, rel=1e-4)
