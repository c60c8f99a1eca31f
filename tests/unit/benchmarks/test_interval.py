"""Confidence intervals against values known from elsewhere."""

import numpy as np
import pytest

from zimage_turbo.benchmarks import interval
from zimage_turbo.demo.evaluate import lower_bound


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # R. G. Newcombe 1998, table I, method 3: Wilson's score interval
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(right, total, low, high):
    assert interval.wilson(right, total) == pytest.approx([low, high], abs=5e-5)
    assert interval.wilson(total - right, total) == pytest.approx([1 - high, 1 - low], abs=5e-5)
    assert interval.wilson(right, total)[0] == pytest.approx(lower_bound(right, total, interval.Z95), abs=1e-5)


def test_bootstrap_of_a_mean_is_what_theory_says():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = interval.bootstrap(values)
    half = interval.Z95 * values.std() / len(values) ** 0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert (high + low) / 2 == pytest.approx(values.mean(), abs=0.1 * half)


def test_bootstrap_holds_the_true_mean_in_19_of_20_samples():
    rng = np.random.default_rng(2)
    bounds = [interval.bootstrap(rng.exponential(1.0, 100)) for _ in range(200)]
    assert 0.88 <= np.mean([low <= 1.0 <= high for low, high in bounds]) <= 0.98


def test_bootstrap_of_equal_values_is_that_value():
    assert interval.bootstrap([0.25] * 5) == [0.25, 0.25]


def test_pairs_are_compared_prompt_by_prompt():
    found = interval.paired([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 1.0, 5.0])
    assert (found["lower"], found["higher"], found["mean"]) == (0.5, 0.25, 0.0)
    assert interval.paired([5.0, 105.0], [4.0, 104.0])["interval"] == [1.0, 1.0]  # whatever the prompts' own spread
