"""Which page of a pool holds which tokens: prompts that begin alike share pages, and a block table names a prompt's.

A page holds a fixed number of tokens, and its keys and values depend on all tokens before them. So it is found by its
own tokens and by the page that it stands behind: only for a prompt that is the same from its first token on.

The least recently used page is given up first, unless it is in use. It has no page behind it that is still found: a
page is never used without those before it, which then count as used after it.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

Key = tuple[int | None, tuple[int, ...]]  # the page before, None before the first; the page's own tokens


@dataclass(frozen=True)
class Lease:
    """A prompt's block table: the pages of its whole pages, in order.

    `known` hold what belongs to them. `own` come behind those, as many as there was room for: they are to be written,
    and nobody else's until the lease ends. Nothing is own if all of the prompt's whole pages are there.
    """

    known: tuple[int, ...]
    own: tuple[int, ...]


class Pages:
    """`count` pages of `size` tokens each. Leases may overlap, but begin and end in one thread.

    counts: "tokens" that leases were taken for, those of them that were "known", and pages "evicted".
    """

    def __init__(self, count: int, size: int):
        self.size = size
        self.free = list(range(count))
        self.found: dict[Key, int] = {}
        self.recent: OrderedDict[int, Key] = OrderedDict()  # pages that are found, least recently used first
        self.users: Counter[int] = Counter()
        self.counts: Counter[str] = Counter()

    @contextmanager
    def lease(self, ids: Sequence[int]) -> Iterator[Lease]:
        """Pages for these tokens, which are found by others once the lease has ended; not after an exception.

        Those before the last token at most are known, so that there is something left to compute.
        """
        chunks = self.split(ids)
        shared = self.find(chunks)
        known = shared[: (len(ids) - 1) // self.size]
        self.counts.update(tokens=len(ids), known=len(known) * self.size)
        self.users.update(shared)
        own: list[int] = []
        try:
            while len(shared) + len(own) < len(chunks) and (page := self._take()) is not None:
                own.append(page)
            yield Lease(tuple(known), tuple(own))
        except BaseException:
            self.free += own
            raise
        else:
            self._keep(chunks, shared, own)
        finally:
            self.users -= Counter(shared)

    def split(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        """The tokens of each whole page."""
        return [tuple(ids[end - self.size : end]) for end in range(self.size, len(ids) + 1, self.size)]

    def find(self, chunks: list[tuple[int, ...]]) -> list[int]:
        """The pages that hold the first of these chunks, as many as there are."""
        table: list[int] = []
        for chunk in chunks:
            page = self.found.get((table[-1] if table else None, chunk))
            if page is None:
                break
            table.append(page)
        return table

    def _take(self) -> int | None:
        """A page that nobody uses; None if all are in use."""
        if self.free:
            return self.free.pop()
        page = next((page for page in self.recent if not self.users[page]), None)
        if page is not None:
            del self.found[self.recent.pop(page)]
            self.counts["evicted"] += 1
        return page

    def _keep(self, chunks: list[tuple[int, ...]], shared: list[int], own: list[int]) -> None:
        """Make own pages findable, and free those that another lease was faster with."""
        table = list(shared)
        for page, chunk in zip(own, chunks[len(shared) :], strict=False):  # fewer pages if there was no room for more
            key = (table[-1] if table else None, chunk)
            if self.found.setdefault(key, page) == page:
                self.recent[page] = key
            else:
                self.free.append(page)
            table.append(self.found[key])
        for page in reversed(table):
            self.recent.move_to_end(page)
