"""Attention of 16-bit heads of 128 channels on Hopper, in Gluon, the form of Triton in which a kernel places its warps.

FlashAttention (Dao 2023) with the division of labour of its third version (Shah et al. 2024): one warp has the copy
engine bring tiles, three groups of four warps multiply, each 64 queries of its own with the same keys and values. While
one of them is at its softmax, the others keep the tensor cores busy. 192 queries a program go through the keys, rather
than the 128 of two groups: a third less to read from the L2 cache, which draws power that products could have, and 5
even rounds on the 132 multiprocessors of an H100 for the 30 heads of a 1024x1024 picture.

A multiprocessor has one program, which goes from tile to tile: those of a head are neighbours, so that its keys stay in
the L2 cache. The last block of keys, which may not be whole, comes first: its mask is outside of the loop.

Each buffer has two barriers: `full` is met when its bytes have come, `empty` when all who read it are done. How often a
buffer was used tells which phase of its barriers to wait for.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

WIDTH = gl.constexpr(128)  # channels of a head
GROUPS = gl.constexpr(3)  # of warps that multiply
ROWS = gl.constexpr(64)  # queries of a group
KEYS = gl.constexpr(128)  # of a block
STAGES = gl.constexpr(2)  # blocks of keys, and of values, in shared memory
REGISTERS = gl.constexpr((160, 160, 24))  # of a thread: in groups two and three, in what loads; group one has the rest
TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit
def _turns(tiles, programs):
    """Tiles of this program."""
    return gl.cdiv(tiles - gl.program_id(0), programs)


@gluon.jit
def _wait_full(barriers, count):
    stage = count % STAGES
    mbarrier.wait(barriers.index(stage), count // STAGES & 1)
    return stage


@gluon.jit
def _load_block(desc, row, column, buffers, full, empty, count):
    stage = count % STAGES
    mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, column], full.index(stage), buffers.index(stage))


@gluon.jit
def _load(q_desc, k_desc, v_desc, buffers, barriers, queries, keys, heads, programs):
    qs, ks, vs, _ = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    tiles, blocks = gl.cdiv(queries, GROUPS * ROWS), gl.cdiv(keys, KEYS)
    count = 0
    for turn in range(_turns(tiles * heads, programs)):
        tile = gl.program_id(0) + turn * programs
        column, first = tile // tiles * WIDTH, tile % tiles * GROUPS * ROWS
        for group in gl.static_range(GROUPS):
            mbarrier.wait(q_empty.index(group), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(group), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [first + group * ROWS, column], q_full.index(group), qs.index(group)
            )
        for block in range(blocks):
            row = (blocks - 1 - block) * KEYS
            _load_block(k_desc, row, column, ks, k_full, k_empty, count)
            _load_block(v_desc, row, column, vs, v_full, v_empty, count)
            count += 1


@gluon.jit
def _scores(q, ks, full, empty, count, LAYOUT: gl.constexpr):
    stage = _wait_full(full, count)
    scores = gl.zeros((ROWS, KEYS), gl.float32, LAYOUT)
    scores = warpgroup_mma(q, ks.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(empty.index(stage))
    return scores


@gluon.jit
def _add_values(total, weights, vs, full, empty, count, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """total + weights V. The weights go from registers to the tensor core, in the order in which they lie there."""
    weights = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2))
    stage = _wait_full(full, count)
    total = warpgroup_mma(weights, vs.index(stage), total, is_async=True)
    total = warpgroup_mma_wait(0, deps=(total,))
    mbarrier.arrive(empty.index(stage))
    return total


@gluon.jit
def _weights(scores, peak, factor):
    return gl.exp2(scores * factor - peak[:, None])


@gluon.jit
def _sums(weights):
    """[ROWS, 4]: of the columns that each of a row's four threads holds, which costs no exchange between them."""
    return gl.sum(gl.sum(weights.reshape((ROWS, KEYS // 8, 4, 2)), axis=3), axis=1)


@gluon.jit
def _of_rows(vector, LAYOUT: gl.constexpr):
    """A number for each row, as a column beside a tensor of that layout."""
    return gl.convert_layout(vector, gl.SliceLayout(1, LAYOUT))[:, None]


@gluon.jit
def _attend(out_desc, buffers, barriers, queries, keys, heads, programs, factor, GROUP: gl.constexpr):
    qs, ks, vs, outs = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    tiles, blocks = gl.cdiv(queries, GROUPS * ROWS), gl.cdiv(keys, KEYS)
    dtype: gl.constexpr = out_desc.dtype
    count = 0
    for turn in range(_turns(tiles * heads, programs)):
        tile = gl.program_id(0) + turn * programs
        column, first = tile // tiles * WIDTH, (tile % tiles * GROUPS + GROUP) * ROWS
        mbarrier.wait(q_full.index(GROUP), turn & 1)
        q = qs.index(GROUP)
        scores = _scores(q, ks, k_full, k_empty, count, SCORES)
        key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
        scores = gl.where((key < keys - (blocks - 1) * KEYS)[None, :], scores, float("-inf"))
        peak = gl.max(scores, axis=1) * factor
        weights = _weights(scores, peak, factor)
        sums = _sums(weights)
        total = gl.zeros((ROWS, WIDTH), gl.float32, OUT)
        for _ in range(1, blocks):
            total = _add_values(total, weights, vs, v_full, v_empty, count, dtype, OUT)
            count += 1
            scores = _scores(q, ks, k_full, k_empty, count, SCORES)
            new_peak = gl.maximum(peak, gl.max(scores, axis=1) * factor)
            fade = gl.exp2(peak - new_peak)
            peak = new_peak
            total *= _of_rows(fade, OUT)
            weights = _weights(scores, peak, factor)
            sums = sums * gl.convert_layout(fade, gl.SliceLayout(1, sums.type.layout))[:, None] + _sums(weights)
        mbarrier.arrive(q_empty.index(GROUP))
        total = _add_values(total, weights, vs, v_full, v_empty, count, dtype, OUT)
        count += 1
        out = total * _of_rows(1.0 / gl.sum(sums, axis=1), OUT)
        tma.store_wait(0)  # of the tile before
        outs.index(GROUP).store(out.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [first, column], outs.index(GROUP))
    tma.store_wait(0)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit(do_not_specialize=["queries", "keys", "heads", "programs"])
def _attention_kernel(q_desc, k_desc, v_desc, out_desc, queries, keys, heads, programs, factor):
    """All tensors by tokens, [tokens, heads * WIDTH]: what lies beyond the last token is read as zeros, not written."""
    qs = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, ROWS, WIDTH], q_desc.layout)
    ks = gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, WIDTH], k_desc.layout)
    vs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, KEYS, WIDTH], v_desc.layout)
    outs = gl.allocate_shared_memory(out_desc.dtype, [GROUPS, ROWS, WIDTH], out_desc.layout)
    buffers = (qs, ks, vs, outs)
    barriers = (
        _barriers(GROUPS, 1), _barriers(GROUPS, 1), _barriers(STAGES, 1), _barriers(STAGES, GROUPS),
        _barriers(STAGES, 1), _barriers(STAGES, GROUPS),
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_attend, (out_desc, buffers, barriers, queries, keys, heads, programs, factor, 0)),
            (_attend, (out_desc, buffers, barriers, queries, keys, heads, programs, factor, 1)),
            (_attend, (out_desc, buffers, barriers, queries, keys, heads, programs, factor, 2)),
            (_load, (q_desc, k_desc, v_desc, buffers, barriers, queries, keys, heads, programs)),
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
    tiles = triton.cdiv(tokens, GROUPS.value * ROWS.value) * heads
    programs = min(tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    with torch.cuda.device_of(q):
        for image in zip(q, k, v, out, strict=True):
            rows = (ROWS.value, KEYS.value, KEYS.value, ROWS.value)
            tensors = (_described(tensor, number) for tensor, number in zip(image, rows, strict=True))
            _attention_kernel[(programs,)](
                *tensors, tokens, k.shape[2], heads, programs, width**-0.5 * 1.4426950408889634, num_warps=4
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


def _described(tensor, rows):
    """Boxes of so many tokens of one head, of [H, S, D]."""
    heads, tokens, width = tensor.shape
    return TensorDescriptor(tensor, [tokens, heads * width], [tensor.stride(1), 1], [rows, width], TILE)
