"""The ops of `norm` in Triton. Arguments as `norm` has checked them.

A program takes a row here and there of one image. It holds a row in registers, and in fp32 what every row is multiplied
by, made once from the vectors of the image; the next rows are on their way to shared memory meanwhile.
"""

import torch
import triton
import triton.language as tl

PROGRAMS = 264  # for an image, if it has as many rows: 2 on each multiprocessor of an H100, as registers allow


@triton.jit
def _sum_and_max(sum_a, max_a, sum_b, max_b):
    return sum_a + sum_b, tl.maximum(max_a, max_b)


@triton.jit
def columns(x_ptr, BLOCK: tl.constexpr):
    """The columns, a thread's as many together as 16 bytes hold of x: then x, h and FP8 codes need no other order."""
    return tl.max_contiguous(tl.arange(0, BLOCK), 128 // x_ptr.dtype.element_ty.primitive_bitwidth)


@triton.jit
def gain_of_columns(
    weight_ptr, scale_ptr, scale_stride, image, column, mask,
    WEIGHT: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight * (1 + scale) of an image, either of them 1 if it is absent."""
    gain = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHT:
        gain = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if SCALE:
        gain *= 1.0 + tl.load(scale_ptr + image * scale_stride + column, mask=mask, other=0.0).to(tl.float32)
    return gain


@triton.jit
def gain_of_half(post_weight_ptr, gate_ptr, gate_stride, image, column, mask, GATE: tl.constexpr):
    """weight * tanh(gate) of an image, for what half a block computed."""
    gain = tl.load(post_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if GATE:
        gate = tl.load(gate_ptr + image * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
        gain *= 2.0 * tl.sigmoid(2.0 * gate) - 1.0  # tanh(gate)
    return gain


@triton.jit
def _write_normed(x, gain, eps, width, column, mask, out_ptr, row_scale_ptr, row, QUANTISE: tl.constexpr):
    """x / sqrt(mean(x²) + eps) * gain. One pass through shared memory sums the squares and finds the largest."""
    y = x * gain
    if QUANTISE:
        total, largest = tl.reduce((x * x, tl.abs(y)), 0, _sum_and_max)
        factor = tl.rsqrt(total / width + eps)
        largest = tl.maximum(largest * factor, 1e-12)
        tl.store(row_scale_ptr + row, largest / 448.0)
        factor *= 448.0 / largest  # the conversion saturates and keeps NaN
    else:
        factor = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    tl.store(out_ptr + column, (y * factor).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def _norm_modulate_kernel(
    x_ptr, weight_ptr, scale_ptr, out_ptr, row_scale_ptr, tokens, width, scale_stride, eps,
    CENTRE: tl.constexpr, WEIGHT: tl.constexpr, SCALE: tl.constexpr, QUANTISE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    column = columns(x_ptr, BLOCK)
    mask = column < width
    gain = gain_of_columns(weight_ptr, scale_ptr, scale_stride, image, column, mask, WEIGHT, SCALE, BLOCK)
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0), num_stages=STAGES):
        row = image * tokens + token
        start = row * width
        x = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        if CENTRE:
            x = tl.where(mask, x - tl.sum(x, axis=0) / width, 0.0)
        _write_normed(x, gain, eps, width, column, mask, out_ptr + start, row_scale_ptr, row, QUANTISE)


@triton.jit(do_not_specialize=["tokens"])
def _residual_rms_modulate_kernel(
    x_ptr, h_ptr, post_weight_ptr, gate_ptr, next_weight_ptr, scale_ptr, x_out_ptr, out_ptr, row_scale_ptr,
    h_row_scale_ptr, h_column_scale_ptr, tokens, width, gate_stride, scale_stride, h_eps, eps,
    SUMS: tl.constexpr, GATE: tl.constexpr, NEXT: tl.constexpr, SCALE: tl.constexpr, QUANTISE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    column = columns(x_ptr, BLOCK)
    mask = column < width
    h_gain = gain_of_half(post_weight_ptr, gate_ptr, gate_stride, image, column, mask, GATE)
    if SUMS:
        h_column_scale = tl.load(h_column_scale_ptr + column, mask=mask, other=0.0)
    if NEXT:
        gain = gain_of_columns(next_weight_ptr, scale_ptr, scale_stride, image, column, mask, True, SCALE, BLOCK)
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0), num_stages=STAGES):
        row = image * tokens + token
        start = row * width
        h = tl.load(h_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        row_eps = h_eps
        if SUMS:
            h *= h_column_scale
            row_scale = tl.load(h_row_scale_ptr + row)  # 2e-15 or more: it cancels in the norm of its row, but for eps
            row_eps = h_eps / (row_scale * row_scale)
        h = h * tl.rsqrt(tl.sum(h * h, axis=0) / width + row_eps) * h_gain
        rounded = (x + h).to(x_out_ptr.dtype.element_ty)
        tl.store(x_out_ptr + start + column, rounded, mask=mask)
        if NEXT:
            x = rounded.to(tl.float32)
            _write_normed(x, gain, eps, width, column, mask, out_ptr + start, row_scale_ptr, row, QUANTISE)


@triton.jit
def _add_rms_kernel(x_ptr, h_ptr, weight_ptr, x_out_ptr, out_ptr, width, eps, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = column < width
    offset = tl.program_id(0).to(tl.int64) * width + column
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)  # before the sum waits for the row
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    rounded = (x + tl.load(h_ptr + offset, mask=mask, other=0.0).to(tl.float32)).to(x_out_ptr.dtype.element_ty)
    tl.store(x_out_ptr + offset, rounded, mask=mask)
    y = rounded.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, axis=0) / width + eps) * weight
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=mask)


def rms_modulate(x, weight, scale, eps, y, row_scales, split=None):
    _norm_modulate(x, weight, scale, eps, y, row_scales, False, split)


def layer_modulate(x, scale, eps, y, split=None):
    _norm_modulate(x, None, scale, eps, y, None, True, split)


def _norm_modulate(x, weight, scale, eps, y, row_scales, centre, split):
    batch, tokens, width = x.shape
    rows, warps, stages = split or row_split(tokens, width)
    with torch.cuda.device_of(x):
        _norm_modulate_kernel[(triton.cdiv(tokens, rows), batch)](
            x, weight, scale, y, row_scales, tokens, width, row_stride(scale), eps,
            CENTRE=centre, WEIGHT=weight is not None, SCALE=scale is not None, QUANTISE=row_scales is not None,
            BLOCK=triton.next_power_of_2(width), STAGES=stages, num_warps=warps,
        )  # fmt: skip


def residual_rms_modulate(
    x, h, post_weight, gate, next_weight, scale, eps, h_scale, x_out, y, row_scales,
    h_row_scales=None, h_column_scales=None, split=None,
):  # fmt: skip
    """`split`: rows of a program, warps and stages, if others than the rule's are to be measured."""
    batch, tokens, width = x.shape
    rows, warps, stages = split or row_split(tokens, width)
    with torch.cuda.device_of(x):
        _residual_rms_modulate_kernel[(triton.cdiv(tokens, rows), batch)](
            x, h, post_weight, gate, next_weight, scale, x_out, y, row_scales, h_row_scales, h_column_scales,
            tokens, width, row_stride(gate), row_stride(scale), eps * h_scale**2, eps,
            SUMS=h_row_scales is not None, GATE=gate is not None, NEXT=next_weight is not None,
            SCALE=scale is not None, QUANTISE=row_scales is not None, BLOCK=triton.next_power_of_2(width),
            STAGES=stages, num_warps=warps,
        )  # fmt: skip


def add_rms(x, h, weight, eps, x_out, y):
    batch, tokens, width = x.shape
    block, warps = row_blocks(width)
    with torch.cuda.device_of(x):
        _add_rms_kernel[(batch * tokens,)](x, h, weight, x_out, y, width, eps, BLOCK=block, num_warps=warps)


def row_split(tokens, width):
    """(rows of a program, num_warps, num_stages): of few rows one each, of many so many that all programs fit at once.

    With 3 stages two rows of x and h lie in shared memory: 48 KB at 3840 columns of fp32 and fp16.
    """
    block, warps = row_blocks(width)
    return triton.cdiv(tokens, PROGRAMS), warps, 3 if block <= 4096 else 1


def row_blocks(width):
    """(BLOCK, num_warps) for a row in one program: 16 values a thread at 3840 columns."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)


def row_stride(tensor):
    return 0 if tensor is None else tensor.stride(0)
