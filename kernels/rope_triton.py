"""`rope.qk_norm_rope` in Triton: one program holds all heads of a token's q or k, checked by `rope`."""

import torch
import triton
import triton.language as tl

WARPS = 4
ROWS = 2  # tokens that a program takes one after another, so that gains and scales are read once
ROWS_QUANTISED = 1  # into FP8 as many programs as can be are faster, by 3 % on an H100


@triton.jit
def normed_and_turned(x, weight, turn, eps, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """A token's heads [HEADS, BLOCK] in fp32, normed and rotated; turn [BLOCK]: (cos, sin) of every pair."""
    cos, sin = tl.split(tl.reshape(turn, (1, BLOCK // 2, 2)))
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)[:, None] * weight[None, :]
    a, b = tl.split(tl.reshape(x, (HEADS, BLOCK // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (HEADS, BLOCK))


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr, q_ptr, k_ptr, scales_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, table_batch, rows, tokens, heads, eps, bound,
    QUANTISE: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    part = tl.program_id(1)
    head, channel = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = channel < WIDTH
    mask = (head < heads)[:, None] & inside[None, :]
    place = (head * WIDTH)[:, None] + channel[None, :]
    qkv_ptr += part * heads * WIDTH
    x = tl.load(qkv_ptr + first.to(tl.int64) * 3 * heads * WIDTH + place, mask=mask, other=0.0)
    weight_ptr, target, batch_stride, head_stride, token_stride = q_weight_ptr, q_ptr, q_batch, q_head, q_token
    if part == 1:
        weight_ptr, target, batch_stride, head_stride, token_stride = k_weight_ptr, k_ptr, k_batch, k_head, k_token
    target += head[:, None].to(tl.int64) * head_stride + channel[None, :]
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    if QUANTISE:
        scale = tl.maximum(tl.max(tl.abs(weight)), 1e-12) * bound
        if first == 0:
            tl.store(scales_ptr + part, scale)
        weight = weight * (1.0 / scale)
    end = tl.minimum(first + ROWS, rows)
    for row in range(first, end):
        image, token = (row // tokens).to(tl.int64), row % tokens
        # Cosine and sine of a pair lie beside each other, as its two numbers do: one wide load in the layout of x.
        turn = tl.load(table_ptr + image * table_batch + token * WIDTH + channel, mask=inside, other=0.0)
        y = x.to(tl.float32)
        ahead = tl.minimum(row + 1, rows - 1)
        x = tl.load(qkv_ptr + ahead.to(tl.int64) * 3 * heads * WIDTH + place, mask=mask & (ahead < end), other=0.0)
        y = normed_and_turned(y, weight, turn, eps, WIDTH, HEADS, BLOCK)
        tl.store(
            target + image * batch_stride + token.to(tl.int64) * token_stride, y.to(q_ptr.dtype.element_ty), mask=mask
        )


def qk_norm_rope(qkv, q_weight, k_weight, table, eps, out, scales):
    batch, tokens, _, heads, width = qkv.shape
    q, k = out
    rows = ROWS if scales is None else ROWS_QUANTISED
    with torch.cuda.device_of(qkv):
        _qk_norm_rope_kernel[(triton.cdiv(batch * tokens, rows), 2)](
            qkv, q_weight, k_weight, table, q, k, scales,
            *q.stride()[:3], *k.stride()[:3], table.stride(0) if table.ndim == 4 else 0,
            batch * tokens, tokens, heads, eps, width**0.5 / 448, QUANTISE=scales is not None, WIDTH=width,
            HEADS=triton.next_power_of_2(heads), BLOCK=triton.next_power_of_2(width), ROWS=rows, num_warps=WARPS,
        )  # fmt: skip
