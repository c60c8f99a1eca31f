"""One sequence computed by several ranks together: what each of them holds, and how attention sees all of it.

Every rank holds a share of the caption's tokens and one of the picture's, and computes what is per token (products,
norms, modulation, rotation) for these alone. Attention is exact, in one of two forms:

- all-to-all: each rank gets every rank's tokens for its own heads, attends, and gives the tokens back. The method of
  DeepSpeed-Ulysses (arXiv 2309.14509), with heads split as evenly as their number allows instead of in equal parts.
  A rank sends 4 S D (P - 1) / P² values, for S tokens of D channels on P ranks.
- gather: every rank gets every rank's keys and values for all heads, and attends with its own queries. A rank sends
  2 S D (P - 1) / P values: as many on two ranks, P / 2 times as many on more, but in one exchange.

Either may hide the exchange behind work: in stages of some heads each, one stage is exchanged while another attends;
or keys and values go ahead while queries are still being computed. Nothing here waits for the host, and all sizes are
known to it beforehand, so that CUDA graphs can capture the exchange.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..kernels import chunks
from ..kernels.chunks import bounds

ALL, QUERIES, KEYS_AND_VALUES = slice(0, 3), slice(0, 1), slice(1, 3)
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Projection = Callable[[slice], torch.Tensor]


class Form(NamedTuple):
    """How attention is shared out. gather: keys and values go to every rank, else heads are split; stages: of heads;
    ahead: keys and values travel before queries are projected."""

    gather: bool
    stages: int = 1
    ahead: bool = False


FORMS = tuple(Form(gather, *how) for gather in (False, True) for how in ((1, False), (2, False), (1, True)))


class Ranks:
    """This process among the ranks of `group` (None: all), which compute together and are asked for the same things.

    device: where this rank computes; form: of every exchange, None for whichever `forms` says is fastest.
    """

    def __init__(self, device: torch.device, group: "dist.ProcessGroup | None" = None, form: Form | None = None):
        self.device, self.group, self.form = device, group, form
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.forms: dict[tuple[int, int], Form] = {}

    def form_of(self, batch: int, tokens: int) -> Form:
        """How sequences of that size are exchanged: what was measured, or before that what needs fewer bytes."""
        return self.form or self.forms.get(size_class(batch, tokens)) or Form(gather=self.size == 2)

    def share(self, batch: int, words: int, picture: int) -> "Share":
        """This rank's of so many caption tokens and picture tokens, for so many pictures at once."""
        of_words, of_picture = runs(words, picture, self.size)
        form = self.form_of(batch, words + picture)
        lengths = tuple(len(run) for run in of_picture)
        both = tuple(len(run) + length for run, length in zip(of_words, lengths, strict=True))
        own = (slice(run[self.rank].start, run[self.rank].stop) for run in (of_words, of_picture))
        return Share(*own, Exchange(self, lengths, form), Exchange(self, both, form))

    def slowest(self, values: list[float]) -> list[float]:
        """Of each number the largest that any rank has. Waits for the ranks."""
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        return largest.tolist()


def size_class(batch: int, tokens: int) -> tuple[int, int]:
    """What a measured form is remembered by: pictures at once, and tokens up to a factor of two."""
    return batch, tokens.bit_length()


def runs(words: int, picture: int, size: int) -> tuple[list[range], list[range]]:
    """Each rank's caption tokens and picture tokens: each kind as evenly as can be, and so their sum.

    What remains of the picture's tokens goes to the first ranks, of the caption's to the last.
    """
    of_picture = [range(*run) for run in pairwise(bounds(picture, size))]
    of_words = [range(words - end, words - first) for first, end in pairwise(bounds(words, size))]
    return of_words[::-1], of_picture


@dataclass(frozen=True)
class Exchange:
    """How `sizes` tokens, of each rank, attend to each other."""

    ranks: Ranks
    sizes: tuple[int, ...]
    form: Form

    def attention(
        self,
        project: Projection,
        gains: tuple[torch.Tensor, torch.Tensor],
        table: torch.Tensor,
        eps: float,
        attend: Attention,
        quantise: bool = False,
        factor: float = 1.0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Own tokens' queries attending to every rank's keys and values: [B, S, H D] times factor, a power of two.

        project: gives own tokens' (queries, keys, values)[slice] as [B, S, n, H, D], in the type that travels; gains
        of the norms of queries and keys, table and eps: as in `rope.qk_norm_rope`. attend: attention on q, k and v
        [B, heads, tokens, D]. With quantise FP8 rows: codes, and scales [B S, 1].
        """

        def laid_out(parts: slice, count: int) -> tuple[torch.Size, torch.Tensor]:
            x = project(parts)
            return x.shape, chunks.head_chunks(x, gains[parts], table, eps, count)

        shape, attended, count = (self._by_gather if self.form.gather else self._by_heads)(laid_out, attend)
        if count == shape[0] == 1 and factor == 1.0 and not quantise:
            return attended.view(*shape[:2], -1)
        return chunks.join_chunks(attended, shape, count, quantise, factor)

    def whole(self, own: torch.Tensor) -> torch.Tensor:
        """Every rank's tokens [B, sum of sizes, D], in the order of ranks, of own ones [B, S, D]."""
        return self._all_gather(own.transpose(0, 1).contiguous())().transpose(0, 1)

    def _by_heads(self, laid_out: Callable, attend: Attention) -> tuple[tuple[int, ...], torch.Tensor, int]:
        """All-to-all: chunk i of the heads is for rank i mod P, in stage i div P.

        Returns (B, S, H, D), what own tokens attended to in chunks of one part, and how many chunks.
        """
        count, travelling = self.form.stages * self.ranks.size, []
        for parts in (KEYS_AND_VALUES, QUERIES) if self.form.ahead else (ALL,):
            (batch, tokens, n, heads, width), sent = laid_out(parts, count)
            sent, arrivals = sent.view(heads, n * tokens * batch * width), []
            for place, lengths in self._stages(heads):
                received = sent.new_empty(sum(self.sizes), batch, n, lengths[self.ranks.rank], width)
                arrivals.append(self._all_to_all(received, sent[place], self.sizes, lengths))
            travelling.insert(0, arrivals)
        returned, returning = sent.new_empty(heads, tokens * batch * width), []
        for (place, lengths), *arrivals in zip(self._stages(heads), *travelling, strict=True):
            q, k, v = (part for arrival in arrivals for part in arrival().permute(2, 1, 3, 0, 4))
            # With fewer heads than ranks some have none, for which torch's kernels before 2.13 divide by zero.
            back = (attend(q, k, v) if lengths[self.ranks.rank] else q).permute(2, 0, 1, 3).contiguous()
            returning.append(self._all_to_all(returned[place], back, lengths, self.sizes))
        for arrival in returning:
            arrival()
        return (batch, tokens, heads, width), returned.view(-1), count

    def _stages(self, heads: int) -> list[tuple[slice, list[int]]]:
        """Of each stage the heads that travel in it, and how many each rank gets of them."""
        edges, size = bounds(heads, self.form.stages * self.ranks.size), self.ranks.size
        lengths = [end - first for first, end in pairwise(edges)]
        starts = range(0, len(lengths), size)
        return [(slice(edges[first], edges[first + size]), lengths[first : first + size]) for first in starts]

    def _by_gather(self, laid_out: Callable, attend: Attention) -> tuple[tuple[int, ...], torch.Tensor, int]:
        """Keys and values of every rank, a stage's heads at a time, for own queries. Returns as `_by_heads`."""
        (batch, tokens, _, heads, width), kv = laid_out(KEYS_AND_VALUES, self.form.stages)
        layout = tokens, batch, bounds(heads, self.form.stages), width
        arriving = [self._all_gather(piece) for piece in chunks.pieces(kv, 2, *layout)]
        _, q = laid_out(QUERIES, self.form.stages)
        attended = []
        for queries, arrival in zip(chunks.pieces(q, 1, *layout), arriving, strict=True):
            k, v = arrival().permute(2, 1, 3, 0, 4)
            attended.append(attend(queries[:, :, 0].permute(1, 2, 0, 3), k, v).permute(2, 0, 1, 3))
        joined = torch.cat(attended, 2) if len(attended) > 1 else attended[0]
        return (batch, tokens, heads, width), joined.reshape(-1), 1

    def _all_to_all(
        self, taken: torch.Tensor, given: torch.Tensor, taken_rows: Sequence[int], given_rows: Sequence[int]
    ) -> Callable[[], torch.Tensor]:
        """Begin to send each rank so many rows of `given`, and to have theirs in `taken`; call it to wait for that."""
        work = dist.all_to_all_single(taken, given, list(taken_rows), list(given_rows), self.ranks.group, async_op=True)

        def arrival() -> torch.Tensor:
            work.wait()
            return taken

        return arrival

    def _all_gather(self, own: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to have every rank's rows, one rank's after another's, of own [S, ...]; call it to wait for them.

        Pieces of a gather are equally long: where ranks' are not, the short ones get rows that are dropped after.
        """
        most = max(self.sizes)
        even = min(self.sizes) == most
        if not even:
            own = torch.cat((own, own.new_zeros(most - len(own), *own.shape[1:])))
        rows = own.new_empty(most * self.ranks.size, *own.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        work = gather(rows, own, self.ranks.group, async_op=True)

        def arrival() -> torch.Tensor:
            work.wait()
            if even:
                return rows
            return torch.cat([piece[:count] for piece, count in zip(rows.split(most), self.sizes, strict=True)])

        return arrival


class Share(NamedTuple):
    """What a rank holds: which of the caption's tokens and of the picture's, and how each of these sees the others'.

    refining: among picture tokens alone; joint: among both, the caption's first. None: it holds all there is.
    """

    words: slice
    picture: slice
    refining: Exchange | None
    joint: Exchange | None

    def angles(self, table: torch.Tensor, words: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Own rows of the table of all tokens, of which `words` come first: of all own tokens, and of the picture's."""
        of_picture = table[words:][self.picture]
        return (table if self is WHOLE else torch.cat((table[:words][self.words], of_picture))), of_picture


WHOLE = Share(slice(None), slice(None), None, None)
