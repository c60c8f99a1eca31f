"""Attention in Triton, in 16 bit and with FP8 operands. Arguments as `attention.request` has checked them.

One program holds BLOCK_M queries of a head and goes over the keys BLOCK_N at a time. The softmax is exact, in fp32 and
base 2, with a running maximum. Only the last keys are masked, outside the main loop.
"""

import torch
import triton
import triton.language as tl

from .arguments import FP8
from .heads_triton import quantise_heads

# P in [0, 1] times 2^8: FP8 (up to 448, down to 2^-9) then keeps weights down to 2^-17 of the largest
FP8_SHIFT = 8.0


@triton.jit
def _attend(
    total, peak, values, q, k_ptr, v_ptr, first, length, k_token, v_token, v_channel, scale,
    MASKED: tl.constexpr, SHIFT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    key, channel = tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    k_tile = k_ptr + key[:, None] * k_token + channel[None, :]
    v_tile = v_ptr + key[:, None] * v_token + channel[None, :] * v_channel
    if MASKED:
        attended = first + key < length
        k = tl.load(k_tile, mask=attended[:, None], other=0.0).to(COMPUTE)
        v = tl.load(v_tile, mask=attended[:, None], other=0.0).to(COMPUTE)
    else:
        k = tl.load(k_tile).to(COMPUTE)
        v = tl.load(v_tile).to(COMPUTE)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(attended[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale[:, None] - (new_peak - SHIFT)[:, None])
    fade = tl.exp2(peak - new_peak)
    total = total * fade + tl.sum(weights, axis=1)
    values = tl.dot(weights.to(COMPUTE), v, values * fade[:, None], input_precision="ieee")
    return total, new_peak, values


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, k_scale_ptr, v_scale_ptr, lengths_ptr, scale, heads, tokens, keys,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, v_channel,
    out_batch, out_head, out_token,
    LENGTHS: tl.constexpr, FP8: tl.constexpr, SHIFT: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64) // heads
    head = tl.program_id(1).to(tl.int64) % heads
    query, channel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    mask = query < tokens
    q_tile = q_ptr + batch * q_batch + head * q_head + query[:, None].to(tl.int64) * q_token + channel[None, :]
    q = tl.load(q_tile, mask=mask[:, None], other=0.0)
    if FP8:
        q = q.to(tl.float32)
        q_scale = tl.maximum(tl.max(tl.abs(q), axis=1), 1e-12) / 448.0
        q = q / q_scale[:, None]
        row_scale = q_scale * (tl.load(k_scale_ptr + batch * heads + head) * scale)
    else:
        row_scale = tl.zeros([BLOCK_M], tl.float32) + scale
    q = q.to(COMPUTE)
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    length = keys
    if LENGTHS:
        length = tl.load(lengths_ptr + batch).to(tl.int32)

    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    values = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    whole = length // BLOCK_N * BLOCK_N
    for first in range(0, whole, BLOCK_N):
        total, peak, values = _attend(
            total, peak, values, q, k_ptr, v_ptr, first, length, k_token, v_token, v_channel, row_scale,
            MASKED=False, SHIFT=SHIFT, COMPUTE=COMPUTE, BLOCK_N=BLOCK_N, WIDTH=WIDTH,
        )  # fmt: skip
        k_ptr += BLOCK_N * k_token
        v_ptr += BLOCK_N * v_token
    if whole < length:
        total, peak, values = _attend(
            total, peak, values, q, k_ptr, v_ptr, whole, length, k_token, v_token, v_channel, row_scale,
            MASKED=True, SHIFT=SHIFT, COMPUTE=COMPUTE, BLOCK_N=BLOCK_N, WIDTH=WIDTH,
        )  # fmt: skip

    values = values / tl.where(total > 0, total, 1.0)[:, None]
    if FP8:
        values = values * tl.load(v_scale_ptr + batch * heads + head)
    out_tile = out_ptr + batch * out_batch + head * out_head + query[:, None].to(tl.int64) * out_token
    tl.store(out_tile + channel[None, :], values.to(out_ptr.dtype.element_ty), mask=mask[:, None])


def attention(q, k, v, lengths, blocks=None, out=None):
    """softmax(q kᵀ / sqrt(D)) v; `blocks`: (BLOCK_M, BLOCK_N, num_warps, num_stages) instead of the rule's."""
    return _launch(q, k, v, None, None, lengths, blocks, out)


def attention_fp8(q, k, v, lengths):
    """The same with q (per row), k, v (per head) and the weights in FP8; what lies beyond lengths must be finite."""
    return attention_quantised(q, *quantise_heads(k), *quantise_heads(v, transposed=True), lengths)


def attention_quantised(q, k_codes, k_scales, v_codes, v_scales, lengths, blocks=None, out=None):
    """attention_fp8 on keys and values that `quantise_heads` has made; v_codes transposed."""
    v = v_codes.transpose(2, 3)[:, :, : k_codes.shape[2]]
    return _launch(q, k_codes, v, k_scales, v_scales, lengths, blocks, out)


def blocks_for(capability, head_dim, fp8):
    """(BLOCK_M, BLOCK_N, num_warps, num_stages): no register spills, and within a multiprocessor's shared memory."""
    if head_dim <= 64:
        return 128, 64, 4, 3
    if capability[0] in (9, 10):  # 227 KiB: 160 KiB in 16 bit, 112 in FP8
        return 128, 128, 8, 3 if fp8 else 2
    return 128, 64, 8, 2  # at most 64 KiB, of 99 or more


def _launch(q, k, v, k_scales, v_scales, lengths, blocks, out):
    batch, heads, tokens, width = q.shape
    if out is None:
        out = torch.empty((batch, tokens, heads, width), dtype=q.dtype, device=q.device).transpose(1, 2)
    fp8 = k_scales is not None
    # the interpreter cannot multiply bf16 and rounds FP8 wrongly: there all arithmetic is in fp32
    compute = _TRITON_DTYPES[k.dtype if q.is_cuda else torch.float32]
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    block_m, block_n, warps, stages = blocks or blocks_for(capability, width, fp8)
    with torch.cuda.device_of(q):
        _attention_kernel[(triton.cdiv(tokens, block_m), batch * heads)](
            q, k, v, out, k_scales, v_scales, lengths, width**-0.5 * 1.4426950408889634, heads, tokens, k.shape[2],
            *q.stride()[:3], *k.stride()[:3], *v.stride(), *out.stride()[:3],
            LENGTHS=lengths is not None, FP8=fp8, SHIFT=FP8_SHIFT if fp8 else 0.0, COMPUTE=compute,
            BLOCK_M=block_m, BLOCK_N=block_n, WIDTH=width, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


_TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, FP8: tl.float8e4nv,
}  # fmt: skip
