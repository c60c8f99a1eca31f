"""The INT4 search (int4_reference.search) in Triton: every shape with three drops for each group."""

import torch
import triton
import triton.language as tl

from .int4_reference import GROUP, TOP, row_scales
from .int4_shapes import DROPS, SHAPES, levels

BLOCK = 128  # groups a program


@triton.jit
def _power_of_two(exponent):
    """2^exponent as fp32, for int32 exponents from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _search_kernel(
    weight_ptr, inverse_scales_ptr, levels_ptr, codes_ptr, groups_ptr, count, groups_in_row, seed,
    SHAPES: tl.constexpr, LAST_DROP: tl.constexpr, TOP: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = group < count
    element = group[:, None] * 16 + tl.arange(0, 16)[None, :]
    units = tl.load(weight_ptr + element, mask=mask[:, None], other=0.0)
    units *= tl.load(inverse_scales_ptr + group // groups_in_row, mask=mask, other=0.0)[:, None]
    exponent = (tl.max(tl.abs(units), axis=1).to(tl.int32, bitcast=True) >> 23) - 127
    own = TOP - 1 - exponent
    drop_0 = tl.minimum(tl.maximum(own - 1, 0), LAST_DROP)
    drop_1 = tl.minimum(tl.maximum(own, 0), LAST_DROP)
    drop_2 = tl.minimum(tl.maximum(own + 1, 0), LAST_DROP)
    scaled_0 = units * _power_of_two(drop_0)[:, None]
    scaled_1 = units * _power_of_two(drop_1)[:, None]
    scaled_2 = units * _power_of_two(drop_2)[:, None]
    best = tl.full((BLOCK,), float("inf"), tl.float32)
    shape = tl.zeros((BLOCK,), tl.int32)
    drop = tl.zeros((BLOCK,), tl.int32)
    for index in range(SHAPES):
        level = tl.load(levels_ptr + index * 16)
        near_0 = tl.abs(scaled_0 - level)
        near_1 = tl.abs(scaled_1 - level)
        near_2 = tl.abs(scaled_2 - level)
        for code in tl.static_range(1, 16):
            level = tl.load(levels_ptr + index * 16 + code)
            near_0 = tl.minimum(near_0, tl.abs(scaled_0 - level))
            near_1 = tl.minimum(near_1, tl.abs(scaled_1 - level))
            near_2 = tl.minimum(near_2, tl.abs(scaled_2 - level))
        error_0 = tl.sum(near_0 * near_0, axis=1) * _power_of_two(-2 * drop_0)
        error_1 = tl.sum(near_1 * near_1, axis=1) * _power_of_two(-2 * drop_1)
        error_2 = tl.sum(near_2 * near_2, axis=1) * _power_of_two(-2 * drop_2)
        error = tl.minimum(error_0, tl.minimum(error_1, error_2))
        better = error < best
        best = tl.where(better, error, best)
        shape = tl.where(better, index, shape)
        drop = tl.where(better, tl.where(error == error_0, drop_0, tl.where(error == error_1, drop_1, drop_2)), drop)

    scaled = units * _power_of_two(drop)[:, None]
    row = levels_ptr + shape * 16
    code = tl.zeros((BLOCK, 16), tl.int32)
    if STOCHASTIC:
        for index in tl.static_range(1, 15):
            code += (scaled >= tl.load(row + index)[:, None]).to(tl.int32)
        below = tl.load(row[:, None] + code)
        above = tl.load(row[:, None] + code + 1)
        chance = tl.rand(seed, element.to(tl.int32))
        code += (chance * (above - below) < scaled - below).to(tl.int32)
    else:
        for index in tl.static_range(15):
            middle = (tl.load(row + index) + tl.load(row + index + 1)) * 0.5
            code += (scaled > middle[:, None]).to(tl.int32)
    even, odd = tl.split(code.reshape(BLOCK, 8, 2))
    place = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(codes_ptr + place, (even | (odd << 4)).to(tl.uint8), mask=mask[:, None])
    tl.store(groups_ptr + group, ((shape << 3) | drop).to(tl.uint8), mask=mask)


def search(weight, seed):
    """codes [N, K/2], groups [N, K/16] and scales [N] of weight [N, K] float32; seed != 0 rounds stochastically."""
    rows, columns = weight.shape
    scales = row_scales(weight)
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    codes = torch.empty((rows, columns // 2), dtype=torch.uint8, device=weight.device)
    groups = torch.empty((rows, columns // GROUP), dtype=torch.uint8, device=weight.device)
    with torch.cuda.device_of(weight):
        _search_kernel[(triton.cdiv(groups.numel(), BLOCK),)](
            weight, inverse, levels(weight.device), codes, groups, groups.numel(), groups.shape[1], seed,
            SHAPES=len(SHAPES), LAST_DROP=DROPS - 1, TOP=TOP, STOCHASTIC=seed != 0, BLOCK=BLOCK,
        )  # fmt: skip
    return codes, groups, scales
