"""Attention in Triton, in 16 bit. Arguments as `attention.request` has checked them.

One program holds BLOCK_M queries of a head and goes over the keys BLOCK_N at a time. The softmax is exact, in fp32 and
base 2, with a running maximum. Only the last keys are masked, outside the main loop.
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def _attend(
    total, peak, values, q, k_ptr, v_ptr, first, length, k_token, v_token, scale,
    MASKED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    key, channel = tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    k_tile = k_ptr + key[:, None] * k_token + channel[None, :]
    v_tile = v_ptr + key[:, None] * v_token + channel[None, :]
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
    weights = tl.exp2(scores * scale - new_peak[:, None])
    fade = tl.exp2(peak - new_peak)
    total = total * fade + tl.sum(weights, axis=1)
    values = tl.dot(weights.to(COMPUTE), v, values * fade[:, None], input_precision="ieee")
    return total, new_peak, values


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lengths_ptr, scale, heads, tokens, keys,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch, out_head, out_token,
    LENGTHS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64) // heads
    head = tl.program_id(1).to(tl.int64) % heads
    query, channel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    mask = query < tokens
    q_tile = q_ptr + batch * q_batch + head * q_head + query[:, None].to(tl.int64) * q_token + channel[None, :]
    q = tl.load(q_tile, mask=mask[:, None], other=0.0).to(COMPUTE)
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
            total, peak, values, q, k_ptr, v_ptr, first, length, k_token, v_token, scale,
            MASKED=False, COMPUTE=COMPUTE, BLOCK_N=BLOCK_N, WIDTH=WIDTH,
        )  # fmt: skip
        k_ptr += BLOCK_N * k_token
        v_ptr += BLOCK_N * v_token
    if whole < length:
        total, peak, values = _attend(
            total, peak, values, q, k_ptr, v_ptr, whole, length, k_token, v_token, scale,
            MASKED=True, COMPUTE=COMPUTE, BLOCK_N=BLOCK_N, WIDTH=WIDTH,
        )  # fmt: skip

    values = values / tl.where(total > 0, total, 1.0)[:, None]
    out_tile = out_ptr + batch * out_batch + head * out_head + query[:, None].to(tl.int64) * out_token
    tl.store(out_tile + channel[None, :], values.to(out_ptr.dtype.element_ty), mask=mask[:, None])


def blocks_for(capability, head_dim):
    """(BLOCK_M, BLOCK_N, num_warps, num_stages): no register spills, and within a multiprocessor's shared memory."""
    if head_dim <= 64:
        return 128, 64, 4, 3
    if capability[0] in (9, 10):  # 160 of 227 KiB
        return 128, 128, 8, 2
    return 128, 64, 8, 2  # at most 64 KiB, of 99 or more


def attention(q, k, v, lengths, blocks=None, out=None):
    """softmax(q kᵀ / sqrt(D)) v; `blocks`: (BLOCK_M, BLOCK_N, num_warps, num_stages) instead of the rule's."""
    batch, heads, tokens, width = q.shape
    if out is None:
        out = torch.empty((batch, tokens, heads, width), dtype=q.dtype, device=q.device).transpose(1, 2)
    # the interpreter cannot multiply bf16: there all arithmetic is in fp32
    compute = _TRITON_DTYPES[k.dtype if q.is_cuda else torch.float32]
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    block_m, block_n, warps, stages = blocks or blocks_for(capability, width)
    with torch.cuda.device_of(q):
        _attention_kernel[(triton.cdiv(tokens, block_m), batch * heads)](
            q, k, v, out, lengths, width**-0.5 * math.log2(math.e), heads, tokens, k.shape[2],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            LENGTHS=lengths is not None, COMPUTE=compute,
            BLOCK_M=block_m, BLOCK_N=block_n, WIDTH=width, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
