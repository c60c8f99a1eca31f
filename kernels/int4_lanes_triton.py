"""int4.linear in Triton for few rows: each thread decodes its own part of the tensor core's operands.

A program computes 16 outputs of 8 rows; its warps share out the columns in steps of 128 and add up their sums at the
end. Every tensor has one element a thread. The products are mma.m16n8k16: y^T = W x^T with 16 outputs, 8 of x's rows
and 16 columns. Of its operands the thread 4 g + t of a warp holds outputs g and g + 8, row g, and four columns; which
ones these are is free, as long as W and x agree. So a thread takes 32 neighbouring columns, two groups of codes, and
reads the same 32 of x: nothing has to pass through shared memory.

A weight goes from its FP8 byte (sign, 4 bits of exponent, 3 of mantissa, never subnormal) to 16 bits by moving the
fields and adding to the exponent. The shapes are held by the 32 lanes of a warp, which read them from each other.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .int4_decode_triton import from_lane, load_four, look_up, permute_bytes
from .int4_early_triton import early
from .int4_shapes import shapes
from .int4_slices_triton import sum_slices

STEP = 128  # columns: two groups for each of the 4 threads that share an output


@triton.jit
def _load_codes(pointer, PTX: tl.constexpr):
    """Four neighbouring int32, 16-byte aligned, that no other thread reads.

    Not `ld.global.nc`, here and in _load_x: the kernel before this one may still write them when this one starts.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [pointer.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)


@triton.jit
def _load_x(pointer, PTX: tl.constexpr):
    """Four neighbouring int32, 16-byte aligned."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [pointer.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)


@triton.jit
def _numbers(pair, FP16: tl.constexpr):
    """Both 16-bit numbers of an int32 as fp32."""
    if FP16:
        low = pair.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _outer(weights, x, FP16: tl.constexpr):
    """[warps, 8, 8] of int32 pairs [warps * 32] of outputs g and rows g, summed over the threads that share them."""
    warps: tl.constexpr = weights.shape[0] // 32
    weights_low, weights_high = _numbers(weights.reshape(warps, 8, 1, 4), FP16)
    x_low, x_high = _numbers(x.reshape(warps, 1, 8, 4), FP16)
    return tl.sum(weights_low * x_low + weights_high * x_high, axis=3)


@triton.jit
def _multiply_add(total, w0, w1, w2, w3, x0, x1, FP16: tl.constexpr, PTX: tl.constexpr):
    """total + the product of 16 outputs, 16 columns and 8 rows. total: rows 2 t and 2 t + 1 of outputs g, then g + 8.

    w0, w1: two weights of outputs g and g + 8 at the columns of x0; w2, w3: at those of x1.
    """
    if PTX:
        kind: tl.constexpr = "f16" if FP16 else "bf16"
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k16.row.col.f32." + kind + "." + kind + ".f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3",
            [w0, w1, w2, w3, x0, x1, total[0], total[1], total[2], total[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    threads: tl.constexpr = w0.shape[0]
    first = (_outer(w0, x0, FP16) + _outer(w2, x1, FP16)).reshape(threads, 2)
    second = (_outer(w1, x0, FP16) + _outer(w3, x1, FP16)).reshape(threads, 2)
    even, odd = tl.split(first)
    even_8, odd_8 = tl.split(second)
    return total[0] + even, total[1] + odd, total[2] + even_8, total[3] + odd_8


@triton.jit
def _widened(word, factor, offset, FP16: tl.constexpr, PTX: tl.constexpr):
    """Two int32 of 16-bit numbers: the four FP8 numbers of an int32, moved into place and up in exponent."""
    if PTX:  # a byte with its sign above it, the sign where it will be, the fields shifted into place
        first = permute_bytes(word, word, 0x9180, PTX)
        second = permute_bytes(word, word, 0xB3A2, PTX)
    else:
        first = (((word << 24) >> 24) & 0xFFFF) | (((word << 16) >> 24) << 16)
        second = (((word << 8) >> 24) & 0xFFFF) | ((word >> 24) << 16)
    mask: tl.constexpr = 0x017F017F if FP16 else 0x087F087F
    return _scaled(first & mask, factor, offset, PTX), _scaled(second & mask, factor, offset, PTX)


@triton.jit
def _scaled(word, factor, offset, PTX: tl.constexpr):
    """word * factor + offset in one instruction, which the compiler would take apart."""
    if PTX:
        return tl.inline_asm_elementwise(
            "mad.lo.s32 $0, $1, $2, $3;", "=r,r,r,r", [word, factor, offset], dtype=tl.int32, is_pure=True, pack=1
        )
    return word * factor + offset


@triton.jit
def decode_group(table_ptr, own, low, high, byte, FP16: tl.constexpr, PTX: tl.constexpr):
    """The 16 weights of a group as eight int32, in order of columns.

    own: the shape that the thread's lane holds. byte: the group's, of which only the lower eight bits count.
    """
    t0, t1, t2, t3 = from_lane(table_ptr, own, byte >> 3, PTX)
    if FP16:  # from a bias of 7 to 15
        factor = 128
        offset = 0x20002000 - (byte & 7) * 0x04000400
    else:  # to 127
        factor = 16
        offset = 0x3C003C00 - (byte & 7) * 0x00800080
    b0, b1 = look_up(t0, t1, t2, t3, low, PTX)
    b2, b3 = look_up(t0, t1, t2, t3, high, PTX)
    w0, w1 = _widened(b0, factor, offset, FP16, PTX)
    w2, w3 = _widened(b1, factor, offset, FP16, PTX)
    w4, w5 = _widened(b2, factor, offset, FP16, PTX)
    w6, w7 = _widened(b3, factor, offset, FP16, PTX)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _read_weights(codes_ptr, groups_ptr, step, PTX: tl.constexpr):
    """Codes of 32 columns (four int32) and their two group bytes."""
    codes = _load_codes(codes_ptr + step * 16, PTX)
    return codes[0], codes[1], codes[2], codes[3], tl.load(groups_ptr + step * 4).to(tl.int32)


@triton.jit
def _read_x(x_ptr, step, GROUP: tl.constexpr, PTX: tl.constexpr):
    """A group's 16 columns of a row of x as eight int32."""
    a = _load_x(x_ptr + step * 64 + 8 * GROUP, PTX)
    b = _load_x(x_ptr + step * 64 + 8 * GROUP + 4, PTX)
    return a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]


@triton.jit
def _decode_both(table_ptr, own, low, high, GROUP: tl.constexpr, FP16: tl.constexpr, PTX: tl.constexpr):
    """The weights of a group of outputs g and g + 8: two times eight int32."""
    return (
        decode_group(table_ptr, own, low[2 * GROUP], low[2 * GROUP + 1], low[4] >> (8 * GROUP), FP16, PTX),
        decode_group(table_ptr, own, high[2 * GROUP], high[2 * GROUP + 1], high[4] >> (8 * GROUP), FP16, PTX),
    )


@triton.jit
def _multiply_group(total, weights, x, FP16: tl.constexpr, PTX: tl.constexpr):
    """total + 16 columns of weights times x's."""
    low, high = weights
    for k in tl.static_range(0, 8, 2):
        total = _multiply_add(total, low[k], high[k], low[k + 1], high[k + 1], x[k], x[k + 1], FP16, PTX)
    return total


@triton.jit
def _multiply_step(total, table_ptr, own, low, high, x_ptr, step, FP16: tl.constexpr, PTX: tl.constexpr):
    """total + 32 columns of 16 outputs times x's."""
    for group in tl.static_range(2):
        x = _read_x(x_ptr, step, group, PTX)
        weights = _decode_both(table_ptr, own, low, high, group, FP16, PTX)
        total = _multiply_group(total, weights, x, FP16, PTX)
    return total


@triton.jit
def _add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _store_sums(total, y_ptr, scales_ptr, bias_ptr, first_row, first_output, rows, outputs,
                BIAS: tl.constexpr, SPLIT: tl.constexpr, WARPS: tl.constexpr):  # fmt: skip
    """Eight rows of 16 outputs, the sums of all warps."""
    t0, t1 = total[0].reshape(WARPS, 32), total[1].reshape(WARPS, 32)
    t2, t3 = total[2].reshape(WARPS, 32), total[3].reshape(WARPS, 32)
    sums = tl.reduce((t0, t1, t2, t3), 0, _add_four)
    lane = tl.arange(0, 32)
    for part in tl.static_range(4):
        output = first_output + lane // 4 + part // 2 * 8
        row = first_row + lane % 4 * 2 + part % 2
        fits = (output < outputs) & (row < rows)
        y = sums[part]
        if not SPLIT:
            y *= tl.load(scales_ptr + output, mask=fits, other=0.0)
            if BIAS:
                y += tl.load(bias_ptr + output, mask=fits, other=0.0).to(tl.float32)
        tl.store(y_ptr + row.to(tl.int64) * outputs + output, y.to(y_ptr.dtype.element_ty), mask=fits)


@triton.jit(do_not_specialize=["rows", "steps_in_slice"])
def _product_kernel(
    x_ptr, codes_ptr, groups_ptr, table_ptr, scales_ptr, bias_ptr, y_ptr, rows, outputs, columns, steps_in_slice,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, FP16: tl.constexpr, PTX: tl.constexpr,
    WARPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    thread = tl.arange(0, WARPS * 32)
    g, t = thread // 4 % 8, thread % 4
    steps_in_row = columns // 128
    k_slice = tl.program_id(1)
    first = k_slice * steps_in_slice
    steps = tl.minimum(steps_in_row - first, steps_in_slice)
    first_row = tl.program_id(2) * 8
    first_output = tl.program_id(0) * 16
    # Past the end, outputs and rows are the last ones, and steps the slice's last: none of them counts.
    at = tl.minimum(first_output + g, outputs - 1).to(tl.int64) * steps_in_row + first
    at_8 = tl.minimum(first_output + g + 8, outputs - 1).to(tl.int64) * steps_in_row + first
    codes, groups = codes_ptr + at * 16 + t * 4, groups_ptr + at * 4 + t
    codes_8, groups_8 = codes_ptr + at_8 * 16 + t * 4, groups_ptr + at_8 * 4 + t
    x = x_ptr + (tl.minimum(first_row + g, rows - 1).to(tl.int64) * steps_in_row + first) * 64 + t * 16
    own = load_four(table_ptr + thread % 32 * 4, PTX)
    step = tl.minimum(thread // 32, steps - 1)
    low, high = _read_weights(codes, groups, step, PTX), _read_weights(codes_8, groups_8, step, PTX)
    # Two rounds ahead: what is loaded one round ahead the compiler loads shortly before it is needed.
    next_step = tl.minimum(step + WARPS, steps - 1)
    next_low, next_high = _read_weights(codes, groups, next_step, PTX), _read_weights(codes_8, groups_8, next_step, PTX)
    zero = tl.zeros((WARPS * 32,), tl.float32)
    total = (zero, zero, zero, zero)
    for _ in range(steps // WARPS):
        third_step = tl.minimum(next_step + WARPS, steps - 1)
        third_low = _read_weights(codes, groups, third_step, PTX)
        third_high = _read_weights(codes_8, groups_8, third_step, PTX)
        total = _multiply_step(total, table_ptr, own, low, high, x, step, FP16, PTX)
        low, high, step = next_low, next_high, next_step
        next_low, next_high, next_step = third_low, third_high, third_step
    if steps % WARPS > 0:
        last = _multiply_step(total, table_ptr, own, low, high, x, step, FP16, PTX)
        within = thread // 32 < steps % WARPS
        total = (
            tl.where(within, last[0], total[0]), tl.where(within, last[1], total[1]),
            tl.where(within, last[2], total[2]), tl.where(within, last[3], total[3]),
        )  # fmt: skip
    if SPLIT:
        y_ptr += k_slice.to(tl.int64) * rows * outputs
    _store_sums(total, y_ptr, scales_ptr, bias_ptr, first_row, first_output, rows, outputs, BIAS, SPLIT, WARPS)


def linear(x, codes, groups, scales, bias, out, warps, slices):
    """y [M, N] of contiguous x [M, K] fp16 or bf16, K a multiple of 128, into `out` if given; see int4.linear.

    warps: a power of two, of a program. slices: into how many the columns are cut, each for programs of its own.
    """
    (rows, columns), outputs, device = x.shape, len(codes), x.device
    x = aligned(x)
    y = torch.empty((rows, outputs), dtype=x.dtype, device=device) if out is None else out
    steps_in_slice = triton.cdiv(columns // STEP, slices)
    slices = triton.cdiv(columns // STEP, steps_in_slice)
    sums = torch.empty((slices, rows, outputs), dtype=torch.float32, device=device) if slices > 1 else y
    with torch.cuda.device_of(x):
        _product_kernel[(triton.cdiv(outputs, 16), slices, triton.cdiv(rows, 8))](
            x.view(torch.int32), codes.view(torch.int32), groups.view(torch.uint16), shapes(device).view(torch.int32),
            scales, scales if bias is None else bias, sums, rows, outputs, columns, steps_in_slice,
            BIAS=bias is not None, SPLIT=slices > 1, FP16=x.dtype == torch.float16, PTX=x.is_cuda,
            WARPS=warps, num_warps=warps, **early(x),
        )  # fmt: skip
        if slices > 1:
            sum_slices(sums, scales, bias, y)
    return y


def aligned(x):
    """x, or a copy of it where 16-byte loads would fault."""
    return x.clone() if x.data_ptr() % 16 else x
