"""Attention with FP8 operands in Triton: both products on FP8 tensor cores, the softmax between them exact in fp32.

One program holds a block of queries of a head and goes over the keys a block at a time. Three programs share a
multiprocessor of Hopper, so that one's softmax runs beside another's products. What lies beyond `lengths` must be
finite.
"""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .heads import BLOCK
from .heads_triton import in_token_order
from .registry import capability

ROUNDED = 1 + 2**-4  # weights may all have been rounded up
SHIFT = 8.0  # weights times 2^8: FP8 (up to 448, down to 2^-9) then keeps them down to 2^-17 of the largest


@triton.jit
def _attend(
    total, peak, values, q, k, v, scale, v_scale, attended,
    MASKED: tl.constexpr, SHIFT: tl.constexpr, COMPUTE: tl.constexpr, EXACT_FROM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of keys. The scale of its values, 2^lift, is part of the exponent: `peak` bounds weight times scale."""
    scores = tl.dot(q, k.to(COMPUTE).T, input_precision="ieee")
    if MASKED:
        scores = tl.where(attended[None, :], scores, float("-inf"))
    lift = ((v_scale.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale + lift)
    weights = tl.exp2(scores * scale[:, None] - (new_peak - lift - SHIFT)[:, None])
    fade = tl.exp2(peak - new_peak)
    total = total * fade + tl.sum(weights, axis=1) * tl.exp2(-lift)
    weights = in_token_order(weights.to(COMPUTE), BLOCK, BLOCK)
    # Added up here, not in the product's own sums: Hopper keeps 14 bits of these and cuts off the rest, which is seen
    # where values have a mean in common (of 0.5, over 16448 keys: an error of 0.16 there, 0.003 here).
    added = tl.dot(weights, v.to(COMPUTE).T, input_precision="ieee", max_num_imprecise_acc=EXACT_FROM)
    values = values * fade[:, None] + added
    return total, new_peak, values


@triton.jit
def _largest(pointer, count, BLOCK: tl.constexpr = 1024):
    """The largest of so many positive numbers."""
    found = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        found = tl.maximum(found, tl.load(pointer + place, mask=place < count, other=0.0))
    return tl.max(found, axis=0)


@triton.jit
def _attention_kernel(
    q_ptr, k_desc, v_desc, out_ptr, row_scale_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, lengths_ptr,
    scale, factor, heads, tokens, keys,
    q_batch, q_head, q_token, q_scale_head, q_scale_block, k_scale_head, k_scale_block,
    out_batch, out_head, out_token,
    LENGTHS: tl.constexpr, QUANTISE: tl.constexpr, SHIFT: tl.constexpr, ROUNDED: tl.constexpr, COMPUTE: tl.constexpr,
    EXACT_FROM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block, plane = tl.program_id(0), tl.program_id(1)
    batch, head = plane.to(tl.int64) // heads, plane.to(tl.int64) % heads
    query, channel = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    mask = (query < tokens)[:, None]
    q_tile = q_ptr + batch * q_batch + head * q_head + query[:, None].to(tl.int64) * q_token + channel[None, :]
    q = tl.load(q_tile, mask=mask, other=0.0).to(COMPUTE)
    scale = scale * tl.load(q_scale_ptr + plane * q_scale_head + block * q_scale_block)
    k_scale_ptr += plane * k_scale_head
    blocks = tl.cdiv(keys, BLOCK)
    image_v_scale_ptr = v_scale_ptr + batch * heads * blocks
    v_scale_ptr += plane * blocks
    length = keys
    if LENGTHS:
        length = tl.load(lengths_ptr + batch).to(tl.int32)

    total = tl.zeros([BLOCK], tl.float32)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    values = tl.zeros([BLOCK, WIDTH], tl.float32)
    whole = length // BLOCK
    # Scales are read a block ahead and carried: as part of the loop's pipeline they would cost a barrier a block.
    k_scale, v_scale = tl.load(k_scale_ptr), tl.load(v_scale_ptr)
    for i in range(0, whole):
        row_scale = tl.zeros([BLOCK], tl.float32) + scale * k_scale
        total, peak, values = _attend(
            total, peak, values, q, k_desc.load([plane * keys + i * BLOCK, 0]), v_desc.load([plane * WIDTH, i * BLOCK]),
            row_scale, v_scale, None,
            MASKED=False, SHIFT=SHIFT, COMPUTE=COMPUTE, EXACT_FROM=EXACT_FROM, BLOCK=BLOCK,
        )  # fmt: skip
        ahead = tl.minimum(i + 1, blocks - 1)
        k_scale, v_scale = tl.load(k_scale_ptr + ahead * k_scale_block), tl.load(v_scale_ptr + ahead)
    if whole * BLOCK < length:
        row_scale = tl.zeros([BLOCK], tl.float32) + scale * k_scale
        attended = whole * BLOCK + tl.arange(0, BLOCK) < length
        k, v = k_desc.load([plane * keys + whole * BLOCK, 0]), v_desc.load([plane * WIDTH, whole * BLOCK])
        total, peak, values = _attend(
            total, peak, values, q, k, v, row_scale, v_scale, attended,
            MASKED=True, SHIFT=SHIFT, COMPUTE=COMPUTE, EXACT_FROM=EXACT_FROM, BLOCK=BLOCK,
        )  # fmt: skip

    values = values / tl.where(total > 0, total, 1.0)[:, None]
    if QUANTISE:
        image_scale = _largest(image_v_scale_ptr, heads * blocks) * ROUNDED
        if head == 0:
            tl.store(
                row_scale_ptr + batch * tokens + query,
                tl.zeros([BLOCK], tl.float32) + image_scale * factor,
                mask=query < tokens,
            )
        values = values * (1.0 / image_scale)  # the conversion saturates and keeps NaN
    out_tile = out_ptr + batch * out_batch + head * out_head + query[:, None].to(tl.int64) * out_token
    tl.store(out_tile + channel[None, :], values.to(out_ptr.dtype.element_ty), mask=mask)


def exact_from(compute_capability):
    """After how many keys a product's sums are added up in fp32; None: where that is written, behind each product.

    So does Triton on Hopper. For others it takes what is added to a product for that product's first sums.
    """
    return None if compute_capability[0] == 9 else BLOCK


def launch(q, k, v, lengths, out, row_scales, factor):
    """A kernel of attention_fp8; lengths [B] or None."""
    (q, q_scales), (k, k_scales), (v, v_scales) = q, k, v
    batch, heads, tokens, width = q.shape
    keys, padded = k.shape[2], v.shape[3]
    # the interpreter rounds FP8 wrongly: there all arithmetic is in fp32
    compute = tl.float8e4nv if q.is_cuda else tl.float32
    with torch.cuda.device_of(q):
        _attention_kernel[(triton.cdiv(tokens, BLOCK), batch * heads)](
            q, TensorDescriptor(k, [batch * heads * keys, width], [width, 1], [BLOCK, width]),
            TensorDescriptor(v, [batch * heads * width, padded], [padded, 1], [width, BLOCK]),
            out, row_scales, q_scales, k_scales, v_scales, lengths,
            width**-0.5 * math.log2(math.e), factor, heads, tokens, keys,
            *q.stride()[:3], *q_scales.stride()[1:], *k_scales.stride()[1:], *out.stride()[:3],
            LENGTHS=lengths is not None, QUANTISE=row_scales is not None, SHIFT=SHIFT, ROUNDED=ROUNDED,
            COMPUTE=compute, EXACT_FROM=exact_from(capability(q.device)), BLOCK=BLOCK, WIDTH=width,
            num_warps=4, num_stages=3,
        )  # fmt: skip
