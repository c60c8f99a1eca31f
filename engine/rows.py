"""Rows of a batch that are computed in groups: which belong together, and their results in order again.

Nothing here waits for a GPU, as indexing a tensor by numbers would.
"""

from collections.abc import Hashable, Sequence

import torch

Numbers = tuple[int, ...]


def alike(keys: Sequence[Hashable]) -> list[Numbers]:
    """The numbers of rows with equal keys, group by group, each group where its first row stands."""
    groups: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return [tuple(numbers) for numbers in groups.values()]


def take(batch: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """Those rows of batch [B, …] in that order; batch itself if they are all of them, in order."""
    if tuple(numbers) == tuple(range(len(batch))):
        return batch
    return torch.stack([batch[number] for number in numbers])


def restored(parts: Sequence[torch.Tensor], groups: Sequence[Numbers]) -> torch.Tensor:
    """The batch whose rows `take(batch, numbers)` are parts, for groups that hold each number once."""
    if len(parts) == 1:
        return parts[0]
    rows = {
        number: row
        for part, numbers in zip(parts, groups, strict=True)
        for number, row in zip(numbers, part, strict=True)
    }
    return torch.stack([rows[number] for number in range(len(rows))])
