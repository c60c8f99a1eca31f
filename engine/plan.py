"""How images are spread over ranks: each split over several (sequence parallel), or whole ones side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

AUTO, IMAGES, SEQUENCE = "auto", "images", "sequence"
SPLITS = (AUTO, IMAGES, SEQUENCE)


@dataclass(frozen=True)
class Plan:
    """Groups of ranks that work side by side, and for each the numbers of the images that it draws one after another.

    reason: why, in a sentence, for the log and /health.
    """

    groups: tuple[tuple[int, ...], ...]
    images: tuple[tuple[int, ...], ...]
    reason: str

    def as_dict(self) -> dict[str, int | str]:
        """JSON-ready, for /health."""
        ranks = len(self.groups[0])
        return {
            "split": SEQUENCE if ranks > 1 else IMAGES,
            "ranks_a_picture": ranks,
            "pictures": sum(map(len, self.images)),
            "reason": self.reason,
        }


def choose(
    images: int, islands: Sequence[Sequence[int]], split: str = AUTO, seconds: Mapping[int, float] | None = None
) -> Plan:
    """The plan for so many images of one size on ranks that fast links join into islands.

    seconds: of one step of an image by the number of ranks that it is split over, as measured; what was not measured is
    not chosen by AUTO. Without any, AUTO draws whole images. Groups never cross islands. Raises ValueError for a wrong
    split, and without images or ranks.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}.")
    ranks = sum(map(len, islands))
    if images < 1 or ranks < 1:
        raise ValueError(f"{images} images on {ranks} ranks: there must be at least one of each.")
    if split == IMAGES or ranks == 1:
        return _plan(images, islands, 1, f"{_count(images, 'image')} whole, {_count(ranks, 'rank')}")
    largest = max(map(len, islands))
    if split == SEQUENCE:
        return _plan(images, islands, largest, f"each image split over {_count(largest, 'rank')}, as asked")
    known = {size: time for size, time in (seconds or {}).items() if size <= largest}
    if 1 not in known:
        return _plan(images, islands, 1, "whole images: splitting one has not been measured for this size yet")
    times = {size: _rounds(images, islands, size) * time for size, time in known.items()}
    size = min(times, key=lambda each: (times[each], each))
    if size == 1:
        return _plan(images, islands, 1, f"{_count(images, 'image')} whole: no split was measured to be faster")
    took = f"{1000 * times[size]:.0f} ms for a step of all, {1000 * times[1]:.0f} ms with whole images"
    reason = f"each image split over {size} ranks: {took}"
    return _plan(images, islands, size, reason)


def groups_of(islands: Sequence[Sequence[int]], size: int) -> tuple[tuple[int, ...], ...]:
    """As many groups of that size as the islands have."""
    return tuple(
        tuple(island[start : start + size]) for island in islands for start in range(0, len(island) - size + 1, size)
    )


def _rounds(images: int, islands: Sequence[Sequence[int]], size: int) -> int:
    return math.ceil(images / len(groups_of(islands, size)))


def _plan(images: int, islands: Sequence[Sequence[int]], size: int, reason: str) -> Plan:
    """No more groups than images; the first get one image more where they do not come out even."""
    groups = groups_of(islands, size)[:images]
    ends = [images * (number + 1) // len(groups) for number in range(len(groups))]
    counts = sorted((end - start for start, end in zip([0, *ends], ends, strict=False)), reverse=True)
    starts = [sum(counts[:number]) for number in range(len(counts))]
    shares = tuple(tuple(range(start, start + count)) for start, count in zip(starts, counts, strict=True))
    return Plan(groups, shares, reason)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
