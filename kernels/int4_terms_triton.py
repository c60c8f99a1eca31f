"""int4.linear in Triton for few rows of bf16: the FP8 weights meet x as a sum of two FP8 terms.

A bf16 number has 8 significant bits, an e4m3 number 4: after a power of two for its row, x = high + low exactly, but
for numbers below 2^-10 of their row's largest, which are rounded to 2^-18 of it. So the decoded bytes are multiplied as
they are, W x = W high + W low, at half the work of decoding to 16 bits. One kernel splits x, the other multiplies.

The product's programs compute y^T for a block of outputs over a slice of K: the weights are then the operand that may
come from registers, in the order in which a tensor core takes them from the threads that decoded them. Terms and
results follow that order. The tensor core's sums keep 14 bits, hence each 128 columns are added to fp32 totals. The
last program of a block of outputs adds up the slices, always in the same order.
"""

import torch
import triton
import triton.language as tl

from .int4_decode_triton import bytes_of_words, from_lane, load_lane_shape, look_up_halves
from .int4_shapes import shapes

STEP = 128  # columns, 8 groups
OUTPUTS = 64  # of a program: what four warps multiply at once


@triton.jit
def _significant_4(x):
    """fp32 rounded to 4 significant bits, to even. (The interpreter's own rounding to FP8 is faulty.)"""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["counters"])
def _split_kernel(
    x_ptr, terms_ptr, inverse_ptr, counters_ptr, columns, counters,
    BLOCK: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    counter = tl.arange(0, COUNTERS)
    tl.store(counters_ptr + counter, tl.zeros_like(counter), mask=(counter < counters) & (row == 0))
    column = tl.arange(0, BLOCK)
    mask = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    # The largest magnitude comes to lie in [128, 256). A row of zeros, or nearly, gets the largest scale there is.
    exponent = tl.maximum(tl.max(tl.abs(x), axis=0).to(tl.int32, bitcast=True) >> 23, 8)
    x *= ((261 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(inverse_ptr + row, ((exponent - 7) << 23).to(tl.float32, bitcast=True))
    high = _significant_4(x)
    place = column // 128 * 256 + column // 4 % 8 * 16 + column // 32 % 4 * 4 + column % 4
    terms_ptrs = terms_ptr + row * columns * 2 + tl.max_contiguous(tl.multiple_of(place, 4), 4)
    tl.store(terms_ptrs, high.to(tl.float8e4nv), mask=mask)
    tl.store(terms_ptrs + 128, _significant_4(x - high).to(tl.float8e4nv), mask=mask)


@triton.jit
def _decode(codes, groups, table_ptr, own, PTX: tl.constexpr):
    """FP8 weights [N, 256] of int64 codes [N, 8] and the groups' bytes [N, 8] in the tensor core's order, twice."""
    t0, t1, t2, t3 = from_lane(table_ptr, own, groups >> 3, PTX)
    drop = (groups & 7) * 0x08080808  # no byte's exponent is less
    t0, t1, t2, t3 = t0 - drop, t1 - drop, t2 - drop, t3 - drop
    lower, upper, half = look_up_halves(t0, t1, t2, t3, codes.to(tl.int32), PTX)
    lower_2, upper_2, half_2 = look_up_halves(t0, t1, t2, t3, (codes >> 32).to(tl.int32), PTX)
    w0 = bytes_of_words(lower[0], upper[0], half[0], PTX)
    w1 = bytes_of_words(lower[1], upper[1], half[1], PTX)
    w2 = bytes_of_words(lower_2[0], upper_2[0], half_2[0], PTX)
    w3 = bytes_of_words(lower_2[1], upper_2[1], half_2[1], PTX)
    weights = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [N, 8, 4 bytes, 2, 2]
    # A warp holds rows 8w .. 8w + 7 and as many of the lower half, a lane two groups: 16 of the product's rows, and in
    # each of its 4 products of 32 columns two times 4 of the lane's.
    outputs: tl.constexpr = codes.shape[0]
    weights = weights.reshape(2, outputs // 16, 8, 4, 2, 4, 2, 2)
    weights = weights.permute(1, 0, 2, 4, 6, 7, 3, 5).reshape(outputs, 128)
    return tl.join(weights, weights).permute(0, 2, 1).reshape(outputs, 256)


@triton.jit(do_not_specialize=["rows", "steps_in_slice"])
def _product_kernel(
    terms_ptr, inverse_ptr, codes_ptr, groups_ptr, table_ptr, scales_ptr, bias_ptr, partial_ptr, counters_ptr, y_ptr,
    rows, outputs, columns, steps_in_slice,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, PTX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    block_n, k_slice, block_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    few = row[:, None] < rows
    first = k_slice * steps_in_slice
    steps_in_row = columns // 128
    steps = tl.minimum(steps_in_row - first, steps_in_slice)
    # Outputs past the end are those of the last row; they are not stored.
    output = tl.minimum(block_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64), outputs - 1)
    codes_ptrs = codes_ptr + output[:, None] * (steps_in_row * 8) + first * 8 + tl.arange(0, 8)[None, :]
    groups_ptrs = groups_ptr + output * steps_in_row + first
    terms_ptrs = terms_ptr + row[:, None] * (steps_in_row * 256) + first * 256 + tl.arange(0, 256)[None, :]
    own = load_lane_shape(table_ptr, BLOCK_N, PTX)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(steps):
        codes = tl.load(codes_ptrs + step * 8)
        eight = tl.load(groups_ptrs + step)
        groups = (eight[:, None] >> (tl.arange(0, 8) * 8)[None, :]).to(tl.int32)
        weights = _decode(codes, groups, table_ptr, own, PTX)
        terms = tl.load(terms_ptrs + step * 256, mask=few, other=0.0)
        if PTX:
            total += tl.dot(weights, terms.trans())
        else:
            total += tl.dot(weights, terms.to(tl.float32).trans())
    place = tl.arange(0, BLOCK_N)  # of the product's rows among the weights'
    place = (place // 8 % 2) * (BLOCK_N // 2) + place // 16 * 8 + place % 8
    output = block_n * BLOCK_N + place.to(tl.int64)
    mask = (output[:, None] < outputs) & few.trans()
    if SPLIT:
        slices = tl.num_programs(1)
        partial_ptrs = partial_ptr + row[None, :] * outputs + output[:, None]
        stride = rows.to(tl.int64) * outputs
        tl.store(partial_ptrs + k_slice * stride, total, mask=mask)
        tl.debug_barrier()
        done = tl.atomic_add(counters_ptr + block_m * tl.num_programs(0) + block_n, 1, sem="acq_rel")
        if done == slices - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for index in range(slices):
                total += tl.load(partial_ptrs + index * stride, mask=mask, other=0.0, cache_modifier=".cg")
            _finish(total, inverse_ptr, scales_ptr, bias_ptr, y_ptr, row, rows, output, outputs, mask, BIAS)
    else:
        _finish(total, inverse_ptr, scales_ptr, bias_ptr, y_ptr, row, rows, output, outputs, mask, BIAS)


@triton.jit
def _finish(
    total, inverse_ptr, scales_ptr, bias_ptr, y_ptr, row, rows, output, outputs, mask, BIAS: tl.constexpr
):  # fmt: skip
    total *= tl.load(scales_ptr + output, mask=output < outputs, other=0.0)[:, None]
    total *= tl.load(inverse_ptr + row, mask=row < rows, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + row[None, :] * outputs + output[:, None]
    tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=mask)


def linear(x, codes, groups, scales, bias, out, slices):
    """y [M, N] of contiguous x [M, K] bf16, K a multiple of 128, into `out` if given; see int4.linear.

    slices: into how many the columns are cut, each for programs of its own.
    """
    (rows, columns), outputs, device = x.shape, len(codes), x.device
    y = torch.empty((rows, outputs), dtype=x.dtype, device=device) if out is None else out
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    blocks = triton.cdiv(outputs, OUTPUTS), triton.cdiv(rows, block_m)
    steps_in_slice = triton.cdiv(columns // STEP, slices)
    slices = triton.cdiv(columns // STEP, steps_in_slice)
    terms = torch.empty((rows, 2 * columns), dtype=torch.float8_e4m3fn, device=device)
    inverse = torch.empty(rows, dtype=torch.float32, device=device)
    counters = torch.empty(blocks[0] * blocks[1], dtype=torch.int32, device=device)
    partial = torch.empty((slices, rows, outputs) if slices > 1 else 0, dtype=torch.float32, device=device)
    block = triton.next_power_of_2(columns)
    with torch.cuda.device_of(x):
        _split_kernel[(rows,)](
            x, terms, inverse, counters, columns, len(counters),
            BLOCK=block, COUNTERS=triton.next_power_of_2(len(counters)), num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
        _product_kernel[(blocks[0], slices, blocks[1])](
            terms, inverse, codes.view(torch.int64), groups.view(torch.int64), shapes(device).view(torch.int32),
            scales, scales if bias is None else bias, partial, counters, y, rows, outputs, columns, steps_in_slice,
            BIAS=bias is not None, SPLIT=slices > 1, PTX=x.is_cuda, BLOCK_N=OUTPUTS, BLOCK_M=block_m,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return y
