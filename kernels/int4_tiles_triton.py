"""int4.linear in Triton for 9 to 64 rows: weights are decoded to 16 bits in the registers that the tensor core reads.

A program computes y^T for a block of outputs over a slice of the columns: [BLOCK_N, slice] weights times [slice, M]
activations, so that the weights are the operand that may come from registers. Outputs and columns of a step are
multiplied in the order in which a tensor core takes them from the threads that decoded them, without a detour through
shared memory; activations and results follow that order. Every program puts its part of x's columns into it, or a small
kernel before them does, so that they only copy x.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .int4_decode_triton import load_lane_shape
from .int4_early_triton import early
from .int4_lanes_triton import aligned, decode_group
from .int4_shapes import shapes
from .int4_slices_triton import sum_slices

STEP = 128  # columns, 8 groups
PAIRS = 512  # pairs of columns a program
STAGES = 3  # of the pipeline of loads: a fourth was no faster on an H100


@triton.jit
def _number(bits, FP16: tl.constexpr, PTX: tl.constexpr):
    """The lower 16 bits of an int32 as fp16 or bf16, or fp32 where the interpreter multiplies."""
    if FP16:
        number = bits.to(tl.int16).to(tl.float16, bitcast=True)
        if PTX:
            return number
        else:
            return number.to(tl.float32)
    elif PTX:
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _side_by_side(pair, FP16: tl.constexpr, PTX: tl.constexpr):
    """[..., 2]: the two numbers of each int32."""
    return tl.join(_number(pair, FP16, PTX), _number(pair >> 16, FP16, PTX))


@triton.jit
def _decode(codes, groups, table_ptr, own, FP16: tl.constexpr, PTX: tl.constexpr):
    """Weights [N, 128] of int64 codes [N, 8] and the groups' bytes [N, 8], in the tensor core's order."""
    w0, w1, w2, w3, w4, w5, w6, w7 = decode_group(
        table_ptr, own, codes.to(tl.int32), (codes >> 32).to(tl.int32), groups, FP16, PTX
    )
    q0 = tl.join(_side_by_side(w0, FP16, PTX), _side_by_side(w4, FP16, PTX))
    q1 = tl.join(_side_by_side(w1, FP16, PTX), _side_by_side(w5, FP16, PTX))
    q2 = tl.join(_side_by_side(w2, FP16, PTX), _side_by_side(w6, FP16, PTX))
    q3 = tl.join(_side_by_side(w3, FP16, PTX), _side_by_side(w7, FP16, PTX))
    weights = tl.join(tl.join(q0, q2), tl.join(q1, q3))  # [N, 8, bits 0, 3, 2, 1 of the column]
    # A warp holds rows 8w .. 8w + 7 and as many of the lower half, a lane two groups: 16 of the product's rows, and in
    # each of its 8 products of 16 columns four of the lane's.
    outputs: tl.constexpr = codes.shape[0]
    weights = weights.reshape(2, outputs // 16, 8, 4, 2, 2, 8)
    return weights.permute(1, 0, 2, 4, 6, 3, 5).reshape(outputs, 128)


@triton.jit
def _arrange_kernel(x_ptr, arranged_ptr, count, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """x's columns, in pairs (int32), in the order of _decode."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pair = place % 64
    mask = place < count
    tl.store(arranged_ptr + place, tl.load(x_ptr + place - pair + pair % 4 * 16 + pair // 4, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["rows", "steps_in_slice"])
def _product_kernel(
    x_ptr, codes_ptr, groups_ptr, table_ptr, scales_ptr, bias_ptr, y_ptr, rows, outputs, columns, steps_in_slice,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, FP16: tl.constexpr, PTX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ARRANGED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    block_n, k_slice, block_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    steps_in_row = columns // 128
    first = k_slice * steps_in_slice
    steps = tl.minimum(steps_in_row - first, steps_in_slice)
    # Outputs and rows past the end are the last ones; they are not stored.
    output = tl.minimum(block_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64), outputs - 1)
    codes_ptrs = codes_ptr + output[:, None] * (steps_in_row * 8) + first * 8 + tl.arange(0, 8)[None, :]
    groups_ptrs = groups_ptr + output * steps_in_row + first
    x_ptrs = x_ptr + tl.minimum(row, rows - 1)[:, None] * columns + first * 128 + tl.arange(0, 128)[None, :]
    own = load_lane_shape(table_ptr, BLOCK_N, PTX)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(steps):
        codes = tl.load(codes_ptrs + step * 8)
        eight = tl.load(groups_ptrs + step)
        groups = (eight[:, None] >> (tl.arange(0, 8) * 8)[None, :]).to(tl.int32)
        weights = _decode(codes, groups, table_ptr, own, FP16, PTX)
        x = tl.load(x_ptrs + step * 128)
        if not PTX:
            x = x.to(tl.float32)
        if not ARRANGED:
            x = x.reshape(BLOCK_M, 4, 16, 2).permute(0, 2, 1, 3).reshape(BLOCK_M, 128)
        total = tl.dot(weights, x.trans(), total)
    place = tl.arange(0, BLOCK_N)  # of the product's rows among the weights'
    place = (place // 8 % 2) * (BLOCK_N // 2) + place // 16 * 8 + place % 8
    output = block_n * BLOCK_N + place.to(tl.int64)
    mask = (output[:, None] < outputs) & (row[None, :] < rows)
    y_ptrs = y_ptr + row[None, :] * outputs + output[:, None]
    if SPLIT:
        y_ptrs += k_slice.to(tl.int64) * rows * outputs
    else:
        total *= tl.load(scales_ptr + output, mask=output < outputs, other=0.0)[:, None]
        if BIAS:
            total += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=mask)


def linear(x, codes, groups, scales, bias, out, warps, slices, arranged):
    """y [M, N] of contiguous x [M, K] fp16 or bf16, K a multiple of 128, into `out` if given; see int4.linear.

    warps: 4 or 8, of a program, each with 16 outputs. slices: into how many the columns are cut, each for programs of
    its own. arranged: whether a kernel of its own puts x's columns into order.
    """
    (rows, columns), outputs, device = x.shape, len(codes), x.device
    y = torch.empty((rows, outputs), dtype=x.dtype, device=device) if out is None else out
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    steps_in_slice = triton.cdiv(columns // STEP, slices)
    slices = triton.cdiv(columns // STEP, steps_in_slice)
    sums = torch.empty((slices, rows, outputs), dtype=torch.float32, device=device) if slices > 1 else y
    x = aligned(x)
    with torch.cuda.device_of(x):
        if arranged:
            x = _arrange(x)
        _product_kernel[(triton.cdiv(outputs, 16 * warps), slices, triton.cdiv(rows, block_m))](
            x, codes.view(torch.int64), groups.view(torch.int64), shapes(device).view(torch.int32),
            scales, scales if bias is None else bias, sums, rows, outputs, columns, steps_in_slice,
            BIAS=bias is not None, SPLIT=slices > 1, FP16=x.dtype == torch.float16, PTX=x.is_cuda,
            BLOCK_N=16 * warps, BLOCK_M=block_m, ARRANGED=arranged, num_warps=warps, num_stages=STAGES, **early(x),
        )  # fmt: skip
        if slices > 1:
            sum_slices(sums, scales, bias, y)
    return y


def _arrange(x):
    arranged, pairs = torch.empty_like(x), x.numel() // 2
    _arrange_kernel[(triton.cdiv(pairs, PAIRS),)](
        x.view(torch.int32), arranged.view(torch.int32), pairs, BLOCK=PAIRS, **early(x)
    )
    return arranged
