"""The solver `adaptive`: within its budget, to the last level, whatever the model does."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_turbo.engine import ode
from zimage_turbo.tests.flows import gaussian

SHAPE = (2, 2, 3, 3)


def bent(x, sigma):
    return torch.tanh((sigma - 0.5) / 0.02).view(-1, 1, 1, 1).expand_as(x)


def jumping(x, sigma):
    return torch.where(x > 0, 1.0, -1.0) * torch.where(sigma > 0.5, 1.0, -3.0).view(-1, 1, 1, 1)


def noisy(x, sigma):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(hash(sigma[0].item())))


def growing(x, sigma):
    return 40 * x


WELL_BEHAVED = {
    "still": lambda x, sigma: x,
    "straight": lambda x, sigma: torch.ones_like(x),
    "oscillating": lambda x, sigma: torch.sin(30 * x) / sigma.view(-1, 1, 1, 1),
    "bent": bent,
    "jumping": jumping,
    "noisy": noisy,
}
HOSTILE = {
    "growing": growing,
    "huge": lambda x, sigma: torch.full_like(x, 3e38),
    "large": lambda x, sigma: 1e25 * noisy(x, sigma),
    "infinite": lambda x, sigma: torch.full_like(x, math.inf),
    "nan": lambda x, sigma: x * math.nan,
    "nan at last": lambda x, sigma: torch.where(sigma.view(-1, 1, 1, 1) < 0.4, math.nan, x),
}
SCHEDULES = st.one_of(
    st.builds(ode.sigmas, st.integers(1, 30), st.floats(0.05, 1), st.floats(0.3, 12)),
    st.lists(st.floats(2**-10, 1, width=32), min_size=1, max_size=20, unique=True).map(
        lambda levels: torch.tensor([*sorted(levels, reverse=True), 0.0])
    ),
)
TOLERANCES = st.one_of(st.sampled_from([0.0, 1e-30, 1e30]), st.floats(1e-6, 10))


def run(denoise, levels, tolerance):
    """(result, report, sigmas at which the model was asked)"""
    asked = []

    def counted(x, sigma):
        assert x.shape == SHAPE and sigma.shape == SHAPE[:1]
        asked.append(sigma[0].item())
        return denoise(x, sigma)

    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    try:
        return *ode.solve("adaptive", counted, x, levels, tolerance), asked
    except ValueError as error:
        return error, None, asked


@given(st.sampled_from(sorted(WELL_BEHAVED)), SCHEDULES, TOLERANCES)
@settings(deadline=None, max_examples=300)
def test_the_budget_holds_and_the_end_is_reached(name, levels, tolerance):
    result, report, asked = run(WELL_BEHAVED[name], levels, tolerance)
    if report is None:  # extrapolation over levels that nearly coincide may overflow; it is then said
        assert "NaN or infinite" in str(result)
    else:
        assert torch.isfinite(result).all()
        assert report.sigmas[-1] == 0 and report.nfe == len(asked)
    assert 1 <= len(asked) <= len(levels) - 1
    assert asked[0] == levels[0]
    assert all(before >= after > 0 for before, after in pairwise(asked))


@given(st.sampled_from(sorted(HOSTILE)), SCHEDULES, TOLERANCES)
@settings(deadline=None, max_examples=300)
def test_what_is_not_finite_is_an_error_and_never_a_result(name, levels, tolerance):
    result, report, asked = run(HOSTILE[name], levels, tolerance)
    assert 1 <= len(asked) <= len(levels) - 1
    if report is None:
        assert "NaN or infinite" in str(result)
    else:
        assert torch.isfinite(result).all()
    if name in ("nan", "infinite"):
        assert report is None and len(asked) <= 2


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
def test_tolerance_zero_is_implicit(steps):
    x, levels = torch.randn(SHAPE), ode.sigmas(steps)
    ours, report = ode.solve("adaptive", jumping, x, levels, 0.0)
    theirs, expected = ode.solve("implicit", jumping, x, levels)
    assert torch.equal(ours, theirs)
    assert (report.sigmas, report.errors) == (expected.sigmas, expected.errors)


def test_a_straight_path_takes_few_evaluations():
    """Each step is twice as long as the one before, whatever the budget."""
    x, clean = torch.randn(SHAPE), torch.randn(SHAPE)
    for steps, most in ((8, 5), (100, 9)):
        end, report = ode.solve("adaptive", lambda x, sigma: clean, x, ode.sigmas(steps), 0.01)
        assert report.nfe <= most
        assert torch.allclose(end, clean, atol=1e-5)


def test_steps_are_short_where_the_path_bends():
    _, report = ode.solve("adaptive", bent, torch.randn(SHAPE), torch.linspace(1, 0, 201), 1e-3)
    steps = [((before + after) / 2, before - after) for before, after in pairwise(report.sigmas)]
    shortest = min(length for place, length in steps if abs(place - 0.5) < 0.1)
    assert report.nfe < 200
    assert max(length for place, length in steps if place > 0.6) > 5 * shortest
    assert max(length for place, length in steps if place < 0.4) > 5 * shortest


def test_a_smaller_tolerance_gives_a_smaller_error_for_more_evaluations():
    levels, errors, counts = gaussian.levels(400), [], []
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
        end, report = ode.solve("adaptive", gaussian.denoise, gaussian.exact(1.0), levels, tolerance)
        errors.append((end - gaussian.exact(0.0)).square().mean().sqrt().item())
        counts.append(report.nfe)
        assert errors[-1] < 5 * tolerance
    assert errors == sorted(errors, reverse=True)
    assert counts == sorted(counts) and counts[-1] < 100


def test_it_reaches_officials_error_with_fewer_evaluations():
    levels = gaussian.levels(20)
    end, report = ode.solve("adaptive", gaussian.denoise, gaussian.exact(1.0), levels, 0.01)
    assert (end - gaussian.exact(0.0)).square().mean().sqrt() < 0.5 * gaussian.error("official", levels)
    assert report.nfe <= 10


def test_given_levels_may_end_above_zero():
    """As half of a schedule that was split: the run ends at its last level exactly."""
    levels = ode.sigmas()[:5]
    x = torch.randn(SHAPE)
    end, report = ode.solve("adaptive", lambda x, sigma: torch.zeros_like(x), x, levels, 0.01)
    assert report.sigmas[-1] == 0.75
    assert torch.allclose(end, 0.75 * x, atol=1e-6)
