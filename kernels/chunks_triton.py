"""The ops of `chunks` in Triton, a program taking whole tokens. Arguments as `chunks` has checked them."""

import torch
import triton
import triton.language as tl

from .rope_triton import normed_and_turned

WARPS = 4
ROWS = 2  # tokens that a program takes one after another, so that gains and places are read once


@triton.jit
def _chunk_of(head, heads, chunks):
    """How many heads lie in chunks before a head's own, and how many in its own: as `chunks.bounds` splits them."""
    short, longer = heads // chunks, heads % chunks
    edge = longer * (short + 1)
    among_longer = head < edge
    length = tl.where(among_longer, short + 1, tl.maximum(short, 1))
    first = tl.where(among_longer, 0, edge)
    return (first + (head - first) // length * length).to(tl.int64), length.to(tl.int64)


@triton.jit
def _head_chunks_kernel(
    x_ptr, first_gain_ptr, second_gain_ptr, table_ptr, out_ptr,
    x_token, table_batch, rows, tokens, batch, heads, chunks, normed, eps,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    part, parts = tl.program_id(1), tl.num_programs(1)
    head, channel = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = channel < WIDTH
    mask = (head < heads)[:, None] & inside[None, :]
    source = x_ptr + part * heads * WIDTH + (head * WIDTH)[:, None] + channel[None, :]
    first, length = _chunk_of(head, heads, chunks)
    begin = first * rows * parts + part * length + head - first
    gain_ptr = first_gain_ptr
    if part == 1:
        gain_ptr = second_gain_ptr
    gain = tl.load(gain_ptr + channel, mask=inside & (part < normed), other=0.0).to(tl.float32)
    start = tl.program_id(0) * ROWS
    end = tl.minimum(start + ROWS, rows)
    x = tl.load(source + start.to(tl.int64) * x_token, mask=mask, other=0.0)
    for row in range(start, end):
        image, token = row // tokens, row % tokens
        turn = tl.load(table_ptr + image.to(tl.int64) * table_batch + token * WIDTH + channel, mask=inside, other=0.0)
        y = x.to(tl.float32)
        ahead = tl.minimum(row + 1, rows - 1)
        x = tl.load(source + ahead.to(tl.int64) * x_token, mask=mask & (ahead < end), other=0.0)
        if part < normed:
            y = normed_and_turned(y, gain, turn, eps, WIDTH, HEADS, BLOCK)
        place = (begin + (token * batch + image) * parts * length) * WIDTH
        tl.store(out_ptr + place[:, None] + channel[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _join_chunks_kernel(
    x_ptr, out_ptr, row_scale_ptr, tokens, batch, heads, chunks, factor,
    QUANTISE: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, image = tl.program_id(0), tl.program_id(1)
    head, channel = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    mask = (head < heads)[:, None] & (channel < WIDTH)[None, :]
    first, length = _chunk_of(head, heads, chunks)
    place = (first * tokens * batch + (token * batch + image) * length + head - first) * WIDTH
    x = tl.load(x_ptr + place[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32) * factor
    row = image.to(tl.int64) * tokens + token
    if QUANTISE:
        scale = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0), 1e-12) / 448.0
        tl.store(row_scale_ptr + row, scale)
        x = x * (1.0 / scale)
    target = out_ptr + row * heads * WIDTH + (head * WIDTH)[:, None] + channel[None, :]
    tl.store(target, x.to(out_ptr.dtype.element_ty), mask=mask)


def head_chunks(x, gains, table, eps, chunks, out):
    batch, tokens, parts, heads, width = x.shape
    gain = gains[0] if gains else out  # never read where there is none
    with torch.cuda.device_of(x):
        _head_chunks_kernel[(triton.cdiv(batch * tokens, ROWS), parts)](
            x, gain, gains[1] if len(gains) > 1 else gain, table, out,
            x.stride(1), table.stride(0) if table.ndim == 4 else 0,
            batch * tokens, tokens, batch, heads, chunks, len(gains), eps,
            WIDTH=width, HEADS=triton.next_power_of_2(heads), BLOCK=triton.next_power_of_2(width), ROWS=ROWS,
            num_warps=WARPS,
        )  # fmt: skip


def join_chunks(buffer, shape, chunks, factor, y, row_scales):
    batch, tokens, heads, width = shape
    with torch.cuda.device_of(buffer):
        _join_chunks_kernel[(tokens, batch)](
            buffer, y, row_scales, tokens, batch, heads, chunks, factor, QUANTISE=row_scales is not None,
            WIDTH=width, HEADS=triton.next_power_of_2(heads), BLOCK=triton.next_power_of_2(width), num_warps=WARPS,
        )  # fmt: skip
