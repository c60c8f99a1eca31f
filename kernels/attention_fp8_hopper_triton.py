"""Attention with FP8 operands on Hopper, in Gluon: warps placed as in attention_hopper_triton, to compute what
attention_fp8_triton does.

The softmax weights of 64 queries and 128 keys go to the tensor core from the registers in which their scores lay, as
four FP8 codes in 32 bits. Each block's product starts anew and is added up in fp32 by its group of warps, while the
other groups multiply.
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

from . import attention_fp8_triton
from .heads import BLOCK
from .hopper_tiles_triton import (
    GROUPS,
    KEYS,
    REGISTERS,
    ROWS,
    WIDTH,
    by_threads,
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

HALF = gl.constexpr(BLOCK)  # keys of a block with a scale in common
ROUNDED = gl.constexpr(attention_fp8_triton.ROUNDED)
SHIFT = gl.constexpr(attention_fp8_triton.SHIFT)
STAGES = gl.constexpr(4)  # blocks of keys, and of values, in shared memory
CODES = gl.constexpr(  # two to the lower half of a register, two to the upper one
    "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
    "mov.b32 $0, {low, high}; }"
)


@gluon.jit
def _load(q_desc, k_desc, v_desc, buffers, barriers, sizes):
    queries, keys, heads, tiles, programs = sizes
    qs, ks, vs, _ = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    blocks = gl.cdiv(keys, KEYS)
    count = 0
    for turn in range(count_turns(tiles * heads, programs)):
        head, first, _units = find_tile(turn, tiles, queries, programs)
        load_queries(q_desc, head * queries + first * ROWS, 0, qs, q_full, q_empty, turn)
        for block in range(blocks):
            key = (blocks - 1 - block) * KEYS
            load_block(k_desc, head * keys + key, 0, ks, k_full, k_empty, count)
            load_block(v_desc, head * WIDTH, key, vs, v_full, v_empty, count)
            count += 1


@gluon.jit
def _load_scales(k_scale_ptr, v_scale_ptr, k_scale_block, block, last):
    """Of the keys in both halves of a block, and of their values."""
    first = block * (KEYS // HALF)
    second = gl.minimum(first + 1, last)
    k_scales = gl.load(k_scale_ptr + first * k_scale_block), gl.load(k_scale_ptr + second * k_scale_block)
    return k_scales, (gl.load(v_scale_ptr + first), gl.load(v_scale_ptr + second))


@gluon.jit
def _lift(scale):
    """log2 of a power of two."""
    return ((scale.to(gl.int32, bitcast=True) >> 23) - 127).to(gl.float32)


@gluon.jit
def _inverse(scale):
    """1 / scale of a power of two."""
    return ((254 << 23) - scale.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)


@gluon.jit
def _halves(x):
    """[ROWS, KEYS] as two [ROWS, HALF]: nothing moves between threads."""
    return x.reshape((ROWS, 2, HALF)).permute((0, 2, 1)).split()


@gluon.jit
def _tops(scores):
    """[ROWS, 4]: the largest score that each thread holds of a row."""
    return gl.max(gl.max(by_threads(scores), axis=3), axis=1)


@gluon.jit
def _bound(scores, scale, k_scales, v_scales):
    """[ROWS]: log2 of the largest weight times scale of its value."""
    left, right = _halves(scores)
    left = _tops(left) * (scale * k_scales[0]) + _lift(v_scales[0])
    right = _tops(right) * (scale * k_scales[1]) + _lift(v_scales[1])
    return gl.max(gl.maximum(left, right), axis=1)


@gluon.jit
def _weights_of_half(scores, scale, v_scale, peak):
    return gl.exp2(scores * scale - of_rows(peak - (_lift(v_scale) + SHIFT), scores))


@gluon.jit
def _weights(scores, scale, k_scales, v_scales, peak):
    """(`_codes` of the weights, their sums [ROWS, 4] without the scales of values)."""
    left, right = _halves(scores)
    left = _weights_of_half(left, scale * k_scales[0], v_scales[0], peak)
    right = _weights_of_half(right, scale * k_scales[1], v_scales[1], peak)
    sums = sums_of_threads(left) * _inverse(v_scales[0]) + sums_of_threads(right) * _inverse(v_scales[1])
    return _codes(gl.join(left, right).permute((0, 2, 1)).reshape((ROWS, KEYS))), sums


@gluon.jit
def _codes(weights):
    """[ROWS, KEYS / 4] of int32: four FP8 codes of a thread each, in `heads.TOKEN_ORDER`.

    What a loop carries as FP8 it carries in a register a byte.
    """
    fours = weights.reshape((ROWS, KEYS // 32, 2, 2, 4, 2)).permute((0, 1, 2, 4, 3, 5))
    even, odd = fours.reshape((ROWS, KEYS // 4, 2, 2)).split()
    w0, w2 = even.split()
    w1, w3 = odd.split()
    return gl.inline_asm_elementwise(CODES, "=r,r,r,r,r", [w0, w1, w2, w3], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _operand(codes, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """`_codes` as [ROWS, KEYS], the left side of a product. Nothing moves."""
    FOURS: gl.constexpr = gl.zeros((ROWS, KEYS), gl.int8, LAYOUT).reshape((ROWS, KEYS // 4, 4)).type.layout
    codes = gl.convert_layout(codes, gl.SliceLayout(2, FOURS))[:, :, None].broadcast_to((ROWS, KEYS // 4, 4))
    codes = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [codes], dtype=gl.int8, is_pure=True, pack=4)
    return gl.convert_layout(codes.reshape((ROWS, KEYS)), LAYOUT).to(dtype, bitcast=True)


@gluon.jit
def _values(codes, vs, full, empty, count, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """A block's weights times V."""
    weights = _operand(codes, dtype, gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=4))
    stage = wait_full(full, count)
    values = gl.zeros((ROWS, WIDTH), gl.float32, LAYOUT)
    values = warpgroup_mma(weights, vs.index(stage).permute((1, 0)), values, use_acc=False, is_async=True)
    values = warpgroup_mma_wait(0, deps=(values,))
    mbarrier.arrive(empty.index(stage))
    return values


@gluon.jit
def _largest(pointer, count):
    """The largest of so many positive numbers; every warp reads them all, so that none need be told."""
    LAYOUT: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[32], [64], [128], [256], [512]],
        lane_bases=[[1], [2], [4], [8], [16]],
        warp_bases=[[0], [0]],
        block_bases=[],
        shape=[1024],
    )
    found = gl.zeros((1024,), gl.float32, LAYOUT)
    for start in range(0, count, 1024):
        place = start + gl.arange(0, 1024, layout=LAYOUT)
        found = gl.maximum(found, gl.load(pointer + place, mask=place < count, other=0.0))
    return gl.max(found, axis=0)


@gluon.jit
def _store_row_scales(pointer, first, queries, head, scale):
    """One scale for all rows, which the first head stores."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row = first + gl.arange(0, ROWS, layout=LAYOUT)
    gl.store(pointer + row, gl.full((ROWS,), 1.0, gl.float32, LAYOUT) * scale, mask=(row < queries) & (head == 0))


@gluon.jit
def _attend_unit(
    out_desc, scale_ptrs, scale_strides, buffers, barriers, sizes, head, unit, turn, count, scale, to_out,
    GROUP: gl.constexpr,
):  # fmt: skip
    """ROWS queries of a head: the blocks until then."""
    qs, ks, vs, outs = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    q_scale_ptr, k_scale_ptr, v_scale_ptr, _ = scale_ptrs
    q_scale_head, q_scale_block, k_scale_head, k_scale_block = scale_strides
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32])
    dtype: gl.constexpr = ks.dtype
    keys = sizes[1]
    blocks, last = gl.cdiv(keys, KEYS), gl.cdiv(keys, HALF) - 1
    k_scale_ptr += head * k_scale_head
    v_scale_ptr += head * (last + 1)
    scale *= gl.load(q_scale_ptr + head * q_scale_head + unit * q_scale_block)
    k_scales, v_scales = _load_scales(k_scale_ptr, v_scale_ptr, k_scale_block, blocks - 1, last)
    mbarrier.wait(q_full.index(GROUP), turn & 1)
    q = qs.index(GROUP)
    scores = multiply_keys(q, ks, k_full, k_empty, count, SCORES)
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
    scores = gl.where((key < keys - (blocks - 1) * KEYS)[None, :], scores, float("-inf"))
    peak = _bound(scores, scale, k_scales, v_scales)
    codes, sums = _weights(scores, scale, k_scales, v_scales, peak)
    fade = gl.full((ROWS,), 1.0, gl.float32, peak.type.layout)
    total = gl.zeros((ROWS, WIDTH), gl.float32, OUT)
    for block in range(1, blocks):
        k_scales, v_scales = _load_scales(k_scale_ptr, v_scale_ptr, k_scale_block, blocks - 1 - block, last)
        total = total * of_rows(fade, total) + _values(codes, vs, v_full, v_empty, count, dtype, OUT)
        count += 1
        scores = multiply_keys(q, ks, k_full, k_empty, count, SCORES)
        new_peak = gl.maximum(peak, _bound(scores, scale, k_scales, v_scales))
        fade = gl.exp2(peak - new_peak)
        peak = new_peak
        codes, added = _weights(scores, scale, k_scales, v_scales, peak)
        sums = sums * of_rows(fade, sums) + gl.convert_layout(added, sums.type.layout)
    mbarrier.arrive(q_empty.index(GROUP))
    total = total * of_rows(fade, total) + _values(codes, vs, v_full, v_empty, count, dtype, OUT)
    store_unit(out_desc, outs.index(GROUP), total * of_rows(to_out / gl.sum(sums, axis=1), total), head, unit)
    return count + 1


@gluon.jit
def _attend(
    out_desc, scale_ptrs, scale_strides, buffers, barriers, sizes, scale, factor,
    QUANTISE: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    queries, keys, heads, tiles, programs = sizes
    to_out = 1.0
    if QUANTISE:
        image_scale = _largest(scale_ptrs[2], heads * gl.cdiv(keys, HALF)) * ROUNDED
        to_out = 1.0 / image_scale
    count = 0
    for turn in range(count_turns(tiles * heads, programs)):
        head, first, units = find_tile(turn, tiles, queries, programs)
        if units > GROUP:
            unit = first + GROUP
            count = _attend_unit(
                out_desc, scale_ptrs, scale_strides, buffers, barriers, sizes, head, unit, turn, count, scale, to_out,
                GROUP,
            )  # fmt: skip
            if QUANTISE:
                _store_row_scales(scale_ptrs[3], unit * ROWS, queries, head, image_scale * factor)
        else:
            count = pass_tile(barriers, keys, turn, count, GROUP)
    tma.store_wait(0)


# Nothing but QUANTISE and the type of the result makes another kernel, so that no batch has one compiled in a capture.
@gluon.jit(
    do_not_specialize=[
        "q_scale_ptr", "k_scale_ptr", "v_scale_ptr", "row_scale_ptr", "q_scale_head", "q_scale_block", "k_scale_head",
        "k_scale_block", "queries", "keys", "heads", "tiles", "programs",
    ]
)  # fmt: skip
def _attention_kernel(
    q_desc, k_desc, v_desc, out_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr, row_scale_ptr,
    q_scale_head, q_scale_block, k_scale_head, k_scale_block, queries, keys, heads, tiles, programs, scale, factor,
    QUANTISE: gl.constexpr,
):  # fmt: skip
    """q and k by heads, [heads * tokens, WIDTH], v transposed, [heads * WIDTH, tokens], out by tokens,
    [tokens, heads * WIDTH]."""
    buffers = (
        gl.allocate_shared_memory(q_desc.dtype, [GROUPS, ROWS, WIDTH], q_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, WIDTH], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [STAGES, WIDTH, KEYS], v_desc.layout),
        gl.allocate_shared_memory(out_desc.dtype, [GROUPS, ROWS, WIDTH], out_desc.layout),
    )
    barriers = make_barriers(STAGES)
    ptrs = (q_scale_ptr, k_scale_ptr, v_scale_ptr, row_scale_ptr)
    strides = (q_scale_head, q_scale_block, k_scale_head, k_scale_block)
    sizes = (queries, keys, heads, tiles, programs)
    gl.warp_specialize(
        [
            (_attend, (out_desc, ptrs, strides, buffers, barriers, sizes, scale, factor, QUANTISE, 0)),
            (_attend, (out_desc, ptrs, strides, buffers, barriers, sizes, scale, factor, QUANTISE, 1)),
            (_attend, (out_desc, ptrs, strides, buffers, barriers, sizes, scale, factor, QUANTISE, 2)),
            (_load, (q_desc, k_desc, v_desc, buffers, barriers, sizes)),
        ],
        [4, 4, 1],
        REGISTERS,
    )


def launch(q, k, v, lengths, out, row_scales, factor):
    """A kernel of attention_fp8 that takes no lengths. Raises ValueError if there are any."""
    if lengths is not None:
        raise ValueError("hopper-fp8: takes no lengths; take triton-fp8, or cut keys and values off")
    (batch, heads, queries, width), keys = q[0].shape, k[0].shape[2]
    tiles, programs = share_out(queries, heads, multiprocessors_of(out.device))
    with torch.cuda.device_of(out):
        for image in range(batch):
            (q_codes, q_scales), (k_codes, k_scales), (v_codes, v_scales) = (
                (codes[image].flatten(0, 1), scales[image]) for codes, scales in (q, k, v)
            )
            tensors = (
                described(q_codes, (ROWS.value, width)),
                described(k_codes, (KEYS.value, width)),
                described(v_codes, (width, KEYS.value)),
                described(out[image].transpose(0, 1).view(queries, heads * width), (ROWS.value, width)),
            )
            own_rows = v_scales if row_scales is None else row_scales[image * queries :]
            _attention_kernel[(programs,)](
                *tensors, q_scales, k_scales, v_scales, own_rows, *q_scales.stride(), *k_scales.stride(),
                queries, keys, heads, tiles, programs, width**-0.5 * math.log2(math.e), factor,
                QUANTISE=row_scales is not None, num_warps=4,
            )  # fmt: skip
