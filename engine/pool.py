"""Keys, values and last states of prompts in pages: what a prompt shares with earlier ones is not computed again.

A page of SIZE tokens holds, for every layer that runs, their keys and values after rotation, and what comes out of the
last of these layers. Whole pages only: what is behind a prompt's last whole page is computed each time.

Results are those of computing afresh: a token's row depends on no later one, and all of a layer but its products works
on each row by itself. What is left is whether a product's row comes out the same among fewer rows, and attention's sums
with other counts of masked keys, which add zeros. In fp32 a processor keeps the former from 16 rows on, and as lengths
stay multiples of 32, states were equal to the bit in prompts of up to 256 tokens, and within 3e-7 of their norm, a few
roundings, in longer ones of up to 1,000.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .pages import Lease, Pages

SIZE = 16  # tokens of a page
MOST_PAGES = 256  # eight prompts as long as the model was trained on


@dataclass(frozen=True)
class Shape:
    """What a token takes: keys and values of `heads` heads of `head_width` in each of `layers`, in `dtype`, and the
    last layer's state of `width` in fp32."""

    layers: int
    heads: int
    head_width: int
    dtype: torch.dtype
    width: int
    device: torch.device

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.heads * self.head_width * self.dtype.itemsize + self.width * 4


class Pool:
    """At most `limit` bytes of pages, reserved at once when the first prompt comes."""

    def __init__(self, limit: int):
        self.limit = limit
        self.clear()

    def clear(self) -> None:
        """Free the pages and forget what was in them."""
        self.state, self.pages, self.kv, self.states = None, None, None, None

    @property
    def nbytes(self) -> int:
        return 0 if self.pages is None else self.kv.nbytes + self.states.nbytes

    @contextmanager
    def prompt(self, ids: Sequence[int], shape: Shape, state: Hashable) -> Iterator["Prompt"]:
        """Pages for a prompt of these tokens. state: all else that keys and values depend on; what was kept under
        another is forgotten."""
        if self.pages is None or (shape, state) != self.state:
            self.clear()
            self._reserve(shape)
            self.state = (shape, state)
        kv, states = self.kv, self.states
        with self.pages.lease(ids) as lease:
            yield Prompt(lease, kv, states)

    def _reserve(self, shape: Shape) -> None:
        count = min(MOST_PAGES, self.limit // (SIZE * shape.token_bytes))
        heads = (2, SIZE, shape.heads, shape.head_width)
        with torch.inference_mode(False):  # so that they can be written into in any mode
            self.kv = torch.empty((count, shape.layers, *heads), dtype=shape.dtype, device=shape.device)
            self.states = torch.empty((count, SIZE, shape.width), device=shape.device)
        self.pages = Pages(count, SIZE)


class Prompt:
    """One prompt's pages: the states of its first `known` tokens need not be computed.

    kv [pages, layers, 2, SIZE, G, D], states [pages, SIZE, width].
    """

    def __init__(self, lease: Lease, kv: torch.Tensor, states: torch.Tensor):
        self.kv, self.states = kv, states
        self.known, self.kept = len(lease.known) * SIZE, len(lease.own) * SIZE
        self.shared, self.own = (
            torch.tensor(pages, dtype=torch.long, device=kv.device) for pages in (lease.known, lease.own)
        )

    def with_known(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [1, S, G, D] of a layer behind the known tokens: with those in front, [1, known + S, G, D]."""
        pair = torch.cat((k, v))
        self.kv[self.own, layer] = pair[:, : self.kept].unflatten(1, (len(self.own), SIZE)).transpose(0, 1)
        if self.known:
            pair = torch.cat((self.kv[self.shared, layer].transpose(0, 1).flatten(1, 2), pair), 1)
        return pair[:1], pair[1:]

    def all_states(self, states: torch.Tensor) -> torch.Tensor:
        """states [1, S, width] behind the known tokens: with those in front, [1, known + S, width]."""
        self.states[self.own] = states[0, : self.kept].unflatten(0, (len(self.own), SIZE))
        return torch.cat((self.states[self.shared].flatten(0, 1)[None], states), 1) if self.known else states
