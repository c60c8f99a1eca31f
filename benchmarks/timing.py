"""How long a call keeps the GPU busy, and how much that varies."""

from collections.abc import Callable, Sequence

import numpy as np

QUANTILES = (0.2, 0.5, 0.8)


def quantiles(values: Sequence[float]) -> list[float]:
    """p20, p50 and p80, interpolated between neighbours."""
    return [float(value) for value in np.quantile(values, QUANTILES)]


def milliseconds(run: Callable[[], object], most: int = 9, fewest: int = 3, seconds: float = 2.0) -> list[float]:
    """GPU time of calls after one that is not counted: `most` of them, fewer if they would take longer than `seconds`.

    Where `fewest` is 1 and a call takes more than half of `seconds`, the first is the result.
    """
    import torch

    def once() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    first = once()
    count = min(most, max(fewest, int(seconds * 1000 / first)))
    return [once() for _ in range(count)] if count > 1 else [first]
