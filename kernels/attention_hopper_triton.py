"""Attention of 16-bit heads of 128 channels on Hopper, in Gluon.

FlashAttention (Dao 2023) with the division of labour of its third version (Shah et al. 2024): one warp has the copy
engine bring tiles, three groups of four warps multiply, each 64 queries of its own with the same keys and values. While
one of them is at its softmax, the others keep the tensor cores busy. Up to 192 queries go through the keys at a time,
not 128 as with two groups: a third less to read from the L2 cache, which draws power that products could have, and 5
even rounds on the 132 multiprocessors of an H100 for the 30 heads of a 1024x1024 picture.

Tiles of a head are neighbours, so that its keys stay in the L2 cache. The last block of keys, which may not be whole,
comes first: its mask is outside of the loop.
"""

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_tiles_triton import (
    GROUPS,
    KEYS,
    REGISTERS,
    ROWS,
    WIDTH,
    count_turns,
    described,
    find_tile,
    load_block,
    load_queries,
    make_barriers,
    multiply_keys,
    multiprocessors_of,
    of_rows,
    pass_tile,
    share_out,
    store_unit,
    sums_of_threads,
    wait_full,
)

STAGES = gl.constexpr(2)  # blocks of keys, and of values, in shared memory


@gluon.jit
def _load(q_desc, k_desc, v_desc, buffers, barriers, sizes):
    queries, keys, heads, tiles, programs = sizes
    qs, ks, vs, _ = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    blocks = gl.cdiv(keys, KEYS)
    count = 0
    for turn in range(count_turns(tiles * heads, programs)):
        head, first, _units = find_tile(turn, tiles, queries, programs)
        column = head * WIDTH
        load_queries(q_desc, first * ROWS, column, qs, q_full, q_empty, turn)
        for block in range(blocks):
            row = (blocks - 1 - block) * KEYS
            load_block(k_desc, row, column, ks, k_full, k_empty, count)
            load_block(v_desc, row, column, vs, v_full, v_empty, count)
            count += 1


@gluon.jit
def _add_values(total, weights, vs, full, empty, count, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """total + weights V. The weights go from registers to the tensor core, in the order in which they lie there."""
    weights = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2))
    stage = wait_full(full, count)
    total = warpgroup_mma(weights, vs.index(stage), total, is_async=True)
    total = warpgroup_mma_wait(0, deps=(total,))
    mbarrier.arrive(empty.index(stage))
    return total


@gluon.jit
def _weights(scores, peak, factor):
    return gl.exp2(scores * factor - peak[:, None])


@gluon.jit
def _attend_unit(out_desc, buffers, barriers, keys, head, unit, turn, count, factor, GROUP: gl.constexpr):
    """ROWS queries of a head: the blocks until then."""
    qs, ks, vs, outs = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    dtype: gl.constexpr = out_desc.dtype
    blocks = gl.cdiv(keys, KEYS)
    mbarrier.wait(q_full.index(GROUP), turn & 1)
    q = qs.index(GROUP)
    scores = multiply_keys(q, ks, k_full, k_empty, count, SCORES)
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
    scores = gl.where((key < keys - (blocks - 1) * KEYS)[None, :], scores, float("-inf"))
    peak = gl.max(scores, axis=1) * factor
    weights = _weights(scores, peak, factor)
    sums = sums_of_threads(weights)
    total = gl.zeros((ROWS, WIDTH), gl.float32, OUT)
    for _ in range(1, blocks):
        total = _add_values(total, weights, vs, v_full, v_empty, count, dtype, OUT)
        count += 1
        scores = multiply_keys(q, ks, k_full, k_empty, count, SCORES)
        new_peak = gl.maximum(peak, gl.max(scores, axis=1) * factor)
        fade = gl.exp2(peak - new_peak)
        peak = new_peak
        total *= of_rows(fade, total)
        weights = _weights(scores, peak, factor)
        sums = sums * of_rows(fade, sums) + sums_of_threads(weights)
    mbarrier.arrive(q_empty.index(GROUP))
    total = _add_values(total, weights, vs, v_full, v_empty, count, dtype, OUT)
    out = total * of_rows(1.0 / gl.sum(sums, axis=1), total)
    store_unit(out_desc, outs.index(GROUP), out, head, unit)
    return count + 1


@gluon.jit
def _attend(out_desc, buffers, barriers, sizes, factor, GROUP: gl.constexpr):
    queries, keys, heads, tiles, programs = sizes
    count = 0
    for turn in range(count_turns(tiles * heads, programs)):
        head, first, units = find_tile(turn, tiles, queries, programs)
        if units > GROUP:
            unit = first + GROUP
            count = _attend_unit(out_desc, buffers, barriers, keys, head, unit, turn, count, factor, GROUP)
        else:
            count = pass_tile(barriers, keys, turn, count, GROUP)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["queries", "keys", "heads", "tiles", "programs"])
def _attention_kernel(q_desc, k_desc, v_desc, out_desc, queries, keys, heads, tiles, programs, factor):
    """All tensors by tokens, [tokens, heads * WIDTH]: what lies beyond the last token is read as zeros, not written."""
    qs = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, ROWS, WIDTH], q_desc.layout)
    ks = gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, WIDTH], k_desc.layout)
    vs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, KEYS, WIDTH], v_desc.layout)
    outs = gl.allocate_shared_memory(out_desc.dtype, [GROUPS, ROWS, WIDTH], out_desc.layout)
    buffers = (qs, ks, vs, outs)
    barriers = make_barriers(STAGES)
    sizes = (queries, keys, heads, tiles, programs)
    gl.warp_specialize(
        [
            (_attend, (out_desc, buffers, barriers, sizes, factor, 0)),
            (_attend, (out_desc, buffers, barriers, sizes, factor, 1)),
            (_attend, (out_desc, buffers, barriers, sizes, factor, 2)),
            (_load, (q_desc, k_desc, v_desc, buffers, barriers, sizes)),
        ],
        [4, 4, 1],
        REGISTERS,
    )


def attention(q, k, v, lengths, out=None):
    """q, k, v as `attention` has checked them, lengths None. out [B, H, S, D]: to be written into, [B, S, H, D] in
    memory."""
    batch, heads, tokens, width = q.shape
    if out is None:
        out = torch.empty((batch, tokens, heads, width), dtype=q.dtype, device=q.device).transpose(1, 2)
    q, k, v = map(_by_tokens, (q, k, v))
    tiles, programs = share_out(tokens, heads, multiprocessors_of(q.device))
    with torch.cuda.device_of(q):
        for image in zip(q, k, v, out, strict=True):
            rows = (ROWS.value, KEYS.value, KEYS.value, ROWS.value)
            tensors = (described(_matrix(x), (number, width)) for x, number in zip(image, rows, strict=True))
            _attention_kernel[(programs,)](
                *tensors, tokens, k.shape[2], heads, tiles, programs, width**-0.5 * math.log2(math.e), num_warps=4
            )
    return out


def _by_tokens(tensor):
    """[B, H, S, D] whose heads lie beside each other, where the copy engine can read it: itself, or a copy."""
    _, heads, _, width = tensor.shape
    strides = tensor.stride()[::2]
    packed = heads == 1 or tensor.stride(1) == width
    if packed and tensor.data_ptr() % 16 == 0 and not any(stride % 8 for stride in strides):
        return tensor
    return tensor.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _matrix(x):
    """[S, H D] of [H, S, D] by tokens."""
    heads, tokens, width = x.shape
    return x.as_strided((tokens, heads * width), (x.stride(1), 1))
