"""The softmax of `wide_attention` in Triton, one program a row; both products are torch's."""

import math

import torch
import triton
import triton.language as tl

from .wide_attention import in_runs

BLOCK = 16384  # scores held at once: a whole row at 1024x1024; longer rows are read twice


@triton.jit
def _weights_kernel(scores_ptr, weights_ptr, sums_ptr, keys, factor, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * keys
    weights_ptr += row * keys
    lane = tl.arange(0, BLOCK)
    if WHOLE:
        scores = tl.load(scores_ptr + lane, mask=lane < keys, other=float("-inf"))
        weights = tl.exp2((scores - tl.max(scores, axis=0)) * factor)
        tl.store(weights_ptr + lane, weights.to(weights_ptr.dtype.element_ty), mask=lane < keys)
        tl.store(sums_ptr + row, tl.sum(weights, axis=0))
    else:
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        for first in range(0, keys, BLOCK):
            key = first + lane
            largest = tl.maximum(largest, tl.load(scores_ptr + key, mask=key < keys, other=float("-inf")))
        top = tl.max(largest, axis=0)
        sums = tl.zeros([BLOCK], tl.float32)
        for first in range(0, keys, BLOCK):
            key = first + lane
            scores = tl.load(scores_ptr + key, mask=key < keys, other=float("-inf"))
            weights = tl.exp2((scores - top) * factor)
            tl.store(weights_ptr + key, weights.to(weights_ptr.dtype.element_ty), mask=key < keys)
            sums += weights
        tl.store(sums_ptr + row, tl.sum(sums, axis=0))


def wide_attention(q, k, v):
    return in_runs(q, k, v, weights_of)


def weights_of(scores, dtype, factor):
    rows, keys = scores.shape
    weights = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    sums = torch.empty((rows, 1), dtype=torch.float32, device=scores.device)
    block = min(triton.next_power_of_2(keys), BLOCK)
    with torch.cuda.device_of(scores):
        _weights_kernel[(rows,)](
            scores, weights, sums, keys, factor * math.log2(math.e),
            WHOLE=keys <= block, BLOCK=block, num_warps=min(max(block // 1024, 1), 16),
        )  # fmt: skip
    return weights, sums
