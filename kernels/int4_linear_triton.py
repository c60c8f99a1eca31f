"""int4.linear in Triton for few rows: the weights are decoded in registers on their way to the tensor cores.

A program computes y^T for a block of outputs over a slice of K: [BLOCK_N, K slice] decoded weights times [K slice, M]
activations, so that the weights are the operand that may come from registers. Rows and columns of a step are multiplied
in the order in which a tensor core takes them from the threads that decoded them, without a detour through shared
memory; activations and results follow that order. A second kernel adds up the slices of K and applies the scales.
"""

import torch
import triton
import triton.language as tl

from .int4_decode_triton import load_four, look_up_pairs
from .int4_shapes import halves

GROUP = 16
STEP = 128  # columns, 8 groups


@triton.jit
def _numbers(pair, HIGH: tl.constexpr, FP16: tl.constexpr, PTX: tl.constexpr):
    """One of the two 16-bit numbers of an int32: fp16 or bf16, or fp32 where the interpreter multiplies."""
    bits = pair >> 16 if HIGH else pair
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
    return tl.join(_numbers(pair, False, FP16, PTX), _numbers(pair, True, FP16, PTX))


@triton.jit
def _decode(codes, shape, table_ptr, FP16: tl.constexpr, PTX: tl.constexpr):
    """Weights [N, G, 2, 8] of int64 codes and group bytes [N, G]: bit 0 of the column, then bits 3, 2, 1."""
    h0, h1, h2, h3 = load_four(table_ptr + shape * 8, PTX)
    l0, l1, l2, l3 = load_four(table_ptr + shape * 8 + 4, PTX)
    p0, p1, p2, p3 = look_up_pairs(h0, h1, h2, h3, l0, l1, l2, l3, codes.to(tl.int32), PTX)
    p4, p5, p6, p7 = look_up_pairs(h0, h1, h2, h3, l0, l1, l2, l3, (codes >> 32).to(tl.int32), PTX)
    q0 = tl.join(_side_by_side(p0, FP16, PTX), _side_by_side(p4, FP16, PTX))
    q1 = tl.join(_side_by_side(p1, FP16, PTX), _side_by_side(p5, FP16, PTX))
    q2 = tl.join(_side_by_side(p2, FP16, PTX), _side_by_side(p6, FP16, PTX))
    q3 = tl.join(_side_by_side(p3, FP16, PTX), _side_by_side(p7, FP16, PTX))
    weights = tl.join(tl.join(q0, q2), tl.join(q1, q3))
    return weights.reshape(codes.shape[0], codes.shape[1], 2, 8)


@triton.jit
def _partial_products_kernel(
    x_ptr, codes_ptr, groups_ptr, table_ptr, partial_ptr, rows, outputs, columns, groups_in_row, steps_in_slice,
    FP16: tl.constexpr, PTX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    k_slice = tl.program_id(1)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    eight = tl.arange(0, 8)
    first = k_slice * steps_in_slice
    steps = tl.minimum(groups_in_row // 8 - first, steps_in_slice)
    codes_ptrs = codes_ptr + output[:, None] * groups_in_row + first * 8 + eight[None, :]
    groups_ptrs = groups_ptr + output * (groups_in_row // 8) + first
    x_ptrs = x_ptr + row[:, None] * columns + first * 128 + tl.arange(0, 128)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(steps):
        codes = tl.load(codes_ptrs + step * 8, mask=output[:, None] < outputs, other=0)
        groups = tl.load(groups_ptrs + step, mask=output < outputs, other=0)
        shape = (groups[:, None] >> (eight * 8)[None, :]).to(tl.int32) & 255
        weights = _decode(codes, shape, table_ptr, FP16, PTX)
        # A warp holds rows 8w .. 8w + 7 and as many of the lower half, a lane two groups: 16 of the product's rows, and
        # in each of its 8 products of 16 columns four of the lane's.
        weights = weights.reshape(2, BLOCK_N // 16, 8, 4, 2, 2, 8).permute(1, 0, 2, 4, 6, 3, 5).reshape(BLOCK_N, 128)
        x = tl.load(x_ptrs + step * 128, mask=row[:, None] < rows, other=0.0)
        if not PTX:
            x = x.to(tl.float32)
        x = x.reshape(BLOCK_M, 4, 2, 8, 2).permute(0, 2, 3, 1, 4).reshape(BLOCK_M, 128)
        total = tl.dot(weights, x.trans(), total)
    place = tl.arange(0, BLOCK_N)  # of the product's rows among the weights'
    place = (place // 8 % 2) * (BLOCK_N // 2) + place // 16 * 8 + place % 8
    output = tl.program_id(0) * BLOCK_N + place.to(tl.int64)
    partial_ptrs = partial_ptr + (k_slice.to(tl.int64) * rows + row[None, :]) * outputs + output[:, None]
    tl.store(partial_ptrs, total, mask=(output[:, None] < outputs) & (row[None, :] < rows))


@triton.jit
def _sum_slices_kernel(
    partial_ptr, scales_ptr, bias_ptr, y_ptr, rows, outputs, slices,
    BIAS: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = output < outputs
    k_slice = tl.arange(0, SLICES)[:, None]
    partial_ptrs = partial_ptr + (k_slice * rows + row) * outputs + output[None, :]
    total = tl.sum(tl.load(partial_ptrs, mask=mask[None, :] & (k_slice < slices), other=0.0), axis=0)
    total *= tl.load(scales_ptr + output, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + output, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * outputs + output, total.to(y_ptr.dtype.element_ty), mask=mask)


def linear(x, codes, groups, scales, bias, out=None, warps=4, programs=4):
    """y [M, N] of contiguous x [M, K] fp16 or bf16, K a multiple of 128, into `out` if given; see int4.linear.

    warps: of a program, each with 16 outputs. programs: how many are wanted on each multiprocessor, which decides into
    how many slices K is cut.
    """
    rows, columns = x.shape
    outputs, steps = len(codes), columns // STEP
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device) if out is None else out
    block_n, block_m = 16 * warps, min(64, max(16, triton.next_power_of_2(rows)))
    blocks = triton.cdiv(outputs, block_n), triton.cdiv(rows, block_m)
    slices = max(1, min(steps, programs * _processors(x.device) // (blocks[0] * blocks[1])))
    partial = torch.empty((slices, rows, outputs), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _partial_products_kernel[(blocks[0], slices, blocks[1])](
            x, codes.view(torch.int64), groups.view(torch.int64),
            halves(x.device, x.dtype).view(torch.int32), partial,
            rows, outputs, columns, columns // GROUP, triton.cdiv(steps, slices),
            FP16=x.dtype == torch.float16, PTX=x.is_cuda, BLOCK_N=block_n, BLOCK_M=block_m,
            num_warps=warps, num_stages=3,
        )  # fmt: skip
        slices_block = triton.next_power_of_2(slices)
        block = max(16, 2048 // slices_block)
        _sum_slices_kernel[(triton.cdiv(outputs, block), rows)](
            partial, scales, scales if bias is None else bias, y, rows, outputs, slices,
            BIAS=bias is not None, SLICES=slices_block, BLOCK=block,
        )  # fmt: skip
    return y


def _processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
