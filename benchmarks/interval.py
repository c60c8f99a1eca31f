"""Intervals that hold a figure with 95 % confidence, and paired comparisons."""

from collections.abc import Sequence

import numpy as np

Z95 = 1.959964
ROUNDS = 4000  # of resampling
DIGITS = 5


def wilson(right: int, total: int) -> list[float]:
    """[low, high] of a rate of which `right` of `total` > 0 were seen (Wilson's score interval)."""
    rate, extra = right / total, Z95 * Z95 / total
    middle = (rate + extra / 2) / (1 + extra)
    spread = Z95 * (rate * (1 - rate) / total + extra / (4 * total)) ** 0.5 / (1 + extra)
    return [round(max(0.0, middle - spread), DIGITS), round(min(1.0, middle + spread), DIGITS)]


def bootstrap(values: Sequence[float], seed: int = 0) -> list[float]:
    """[low, high] of the mean of at least one value: the middle 95 % of the means of values drawn anew from them."""
    given, rng = np.asarray(values, float), np.random.default_rng(seed)
    means = given[rng.integers(0, len(given), (ROUNDS, len(given)))].mean(1)
    return [round(float(bound), DIGITS) for bound in np.quantile(means, (0.025, 0.975))]


def mean(values: Sequence[float]) -> dict:
    return {
        "mean": round(float(np.mean(values)), DIGITS),
        "interval": bootstrap(values),
        "median": round(float(np.median(values)), DIGITS),
    }


def paired(values: Sequence[float], others: Sequence[float]) -> dict:
    """How the first differ from the others of the same prompts; lower, higher: on which share of the prompts."""
    first, second = np.asarray(values, float), np.asarray(others, float)
    lower, higher = (round(float(share.mean()), DIGITS) for share in (first < second, first > second))
    return mean(first - second) | {"lower": lower, "higher": higher}


def rates(counts: dict[str, dict]) -> dict[str, dict]:
    """What `demo.evaluate.summarise` counted, each rate with its interval, as if all items were independent."""
    return {
        name: {"right": found["right"], "total": found["total"], "rate": found["rate"],
               "interval": wilson(found["right"], found["total"])}
        for name, found in counts.items()
    }  # fmt: skip
