"""Heads in chunks, as they lie while ranks that compute one sequence together exchange them.

H heads are split into chunks by `bounds`. A chunk of h heads lies in memory as [S, B, n, h, D], and chunk follows chunk
in one flat buffer. S: tokens; B: images; n: of queries, keys and values those that travel together. So what one rank
sends another is one piece of memory, and pieces of several ranks, one after another, are [S', B, n, h, D] again, in
which attention can read its operands as they lie.
"""

from itertools import pairwise

import torch

from .arguments import FLOATS, FP8, check_power_of_two, check_rows, described, outputs, write
from .registry import Registry, Request, lazily, no_refusal, triton_refusal
from .rope import check_table, normed_and_turned

HEAD_CHUNKS = Registry("head_chunks")
JOIN_CHUNKS = Registry("join_chunks")


def bounds(count: int, parts: int) -> list[int]:
    """Where each of `parts` runs of `count` things begins, and where the last ends.

    Lengths differ by at most one, and the longer runs come first.
    """
    short, longer = divmod(count, parts)
    return [run * short + min(run, longer) for run in range(parts + 1)]


def pieces(buffer: torch.Tensor, parts: int, tokens: int, batch: int, edges: list[int], width: int):
    """The chunks in a flat buffer, each [tokens, batch, parts, its heads, width]; edges: what `bounds` gave."""
    head = tokens * batch * parts * width
    return [
        buffer[first * head : end * head].view(tokens, batch, parts, end - first, width)
        for first, end in pairwise(edges)
    ]


def head_chunks(x, gains, table, eps, chunks, out=None, backend="auto"):
    """x [B, S, n, H, D] in chunks of heads; its first parts normed and rotated as `rope.qk_norm_rope` does, for each
    of which `gains` has a weight [D]; the rest as they are.

    x: some or all parts of a joint linear's output: [n, H, D] contiguous, tokens equally far apart, D even. table, eps
    as there. Returns a flat buffer of B S n H D values in x's dtype; out: that, to be written into. Raises ValueError
    on other shapes, dtypes or layouts.
    """
    _check(x, gains, table)
    if out is None:
        out = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
    _check_buffer(out, "out", x.numel(), x)
    HEAD_CHUNKS.choose(backend, Request(x.device)).function(x, gains, table, eps, chunks, out)
    return out


def head_chunks_reference(x, gains, table, eps, chunks, out):
    batch, tokens, parts, heads, width = x.shape
    edges = bounds(heads, chunks)
    laid_out = pieces(out, parts, tokens, batch, edges, width)
    for i, part in enumerate(x.unbind(2)):
        values = normed_and_turned(part, gains[i], table, eps) if i < len(gains) else part
        for piece, (first, end) in zip(laid_out, pairwise(edges), strict=True):
            piece[:, :, i].copy_(values[:, :, first:end].transpose(0, 1))


def join_chunks(buffer, shape, chunks, quantise=False, factor=1.0, out=None, backend="auto"):
    """Rows of all heads, [B, S, H D], times `factor`, a power of two, from chunks of one part; shape: (B, S, H, D).

    In the buffer's dtype; with `quantise` (FP8 codes [B, S, H D], row scales fp32 [B S, 1]), scale = absmax / 448. out:
    what is returned, to be written into. Raises ValueError on other lengths, dtypes or layouts.
    """
    batch, tokens, heads, width = shape
    if buffer.dtype not in FLOATS:
        raise ValueError(f"buffer: expected bf16, fp16 or fp32, got {described(buffer)}")
    _check_buffer(buffer, "buffer", batch * tokens * heads * width, buffer)
    check_power_of_two(factor, "factor")
    y, row_scales = outputs((batch, tokens, heads * width), FP8 if quantise else buffer.dtype, buffer.device, out)
    JOIN_CHUNKS.choose(backend, Request(buffer.device, quantise)).function(buffer, shape, chunks, factor, y, row_scales)
    return (y, row_scales) if quantise else y


def join_chunks_reference(buffer, shape, chunks, factor, y, row_scales):
    batch, tokens, heads, width = shape
    joined = torch.cat(pieces(buffer, 1, tokens, batch, bounds(heads, chunks), width), 3)
    write(joined[:, :, 0].transpose(0, 1).flatten(2).float() * factor, y, row_scales)


def _check(x, gains, table):
    whole = x.ndim == 5 and x.shape[4] % 2 == 0 and x.dtype in FLOATS and x[:1, :1].is_contiguous()
    if not whole or (len(x) > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
        raise ValueError(
            f"x: expected [B, S, n, H, D] of floats with an even D, [n, H, D] contiguous and tokens equally far apart, "
            f"got {described(x)}"
        )
    if len(gains) > x.shape[2]:
        raise ValueError(f"gains: expected at most {x.shape[2]}, one for a part, got {len(gains)}")
    for gain in gains:
        check_rows(gain, "gains", x.shape[4:], like=x)
    check_table(table, x)


def _check_buffer(buffer, name, length, like):
    fits = buffer.shape == (length,) and buffer.dtype == like.dtype and buffer.device == like.device
    if not fits or not buffer.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous [{length}] of {like.dtype} on {like.device}, got {described(buffer)}"
        )


HEAD_CHUNKS.register("triton", lazily("chunks_triton", "head_chunks"), triton_refusal)
HEAD_CHUNKS.register("torch", head_chunks_reference, no_refusal)
JOIN_CHUNKS.register("triton", lazily("chunks_triton", "join_chunks"), triton_refusal)
JOIN_CHUNKS.register("torch", join_chunks_reference, no_refusal)
