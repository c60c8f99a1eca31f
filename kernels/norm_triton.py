"""The ops of `norm` in Triton: one program a row, which it holds in registers. Arguments as `norm` has checked them."""

import torch
import triton
import triton.language as tl


@triton.jit
def _write_row(values, mask, out_ptr, row_scale_ptr, row, offset, QUANTISE: tl.constexpr):
    if QUANTISE:
        row_scale = tl.maximum(tl.max(tl.abs(values), axis=0), 1e-12) / 448.0
        tl.store(row_scale_ptr + row, row_scale)
        values = values * (1.0 / row_scale)  # the conversion saturates and keeps NaN
    tl.store(out_ptr + offset, values.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_modulate_kernel(
    x_ptr, weight_ptr, scale_ptr, out_ptr, row_scale_ptr, tokens, width, scale_stride, eps,
    CENTRE: tl.constexpr, WEIGHT: tl.constexpr, SCALE: tl.constexpr, QUANTISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    offset = row * width + column
    y = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if CENTRE:
        y = tl.where(mask, y - tl.sum(y, axis=0) / width, 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, axis=0) / width + eps)
    if WEIGHT:
        y = y * tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if SCALE:
        y = y * (1.0 + tl.load(scale_ptr + row // tokens * scale_stride + column, mask=mask, other=0.0).to(tl.float32))
    _write_row(y, mask, out_ptr, row_scale_ptr, row, offset, QUANTISE)


@triton.jit
def _residual_rms_modulate_kernel(
    x_ptr, h_ptr, post_weight_ptr, gate_ptr, next_weight_ptr, scale_ptr, x_out_ptr, out_ptr, row_scale_ptr,
    tokens, width, gate_stride, scale_stride, h_eps, eps,
    GATE: tl.constexpr, NEXT: tl.constexpr, SCALE: tl.constexpr, QUANTISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    image = row // tokens
    column = tl.arange(0, BLOCK)
    mask = column < width
    offset = row * width + column
    h = tl.load(h_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    h = h * tl.rsqrt(tl.sum(h * h, axis=0) / width + h_eps)
    h = h * tl.load(post_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if GATE:
        gate = tl.load(gate_ptr + image * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
        h = h * (2.0 * tl.sigmoid(2.0 * gate) - 1.0)  # tanh(gate)
    rounded = (x + h).to(x_out_ptr.dtype.element_ty)
    tl.store(x_out_ptr + offset, rounded, mask=mask)
    if NEXT:
        y = rounded.to(tl.float32)
        y = y * tl.rsqrt(tl.sum(y * y, axis=0) / width + eps)
        y = y * tl.load(next_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
        if SCALE:
            y = y * (1.0 + tl.load(scale_ptr + image * scale_stride + column, mask=mask, other=0.0).to(tl.float32))
        _write_row(y, mask, out_ptr, row_scale_ptr, row, offset, QUANTISE)


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


def rms_modulate(x, weight, scale, eps, y, row_scales):
    _norm_modulate(x, weight, scale, eps, y, row_scales, centre=False)


def layer_modulate(x, scale, eps, y):
    _norm_modulate(x, None, scale, eps, y, None, centre=True)


def _norm_modulate(x, weight, scale, eps, y, row_scales, centre):
    batch, tokens, width = x.shape
    block, warps = row_blocks(width)
    with torch.cuda.device_of(x):
        _norm_modulate_kernel[(batch * tokens,)](
            x, weight, scale, y, row_scales, tokens, width, _row_stride(scale), eps,
            CENTRE=centre, WEIGHT=weight is not None, SCALE=scale is not None, QUANTISE=row_scales is not None,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip


def residual_rms_modulate(x, h, post_weight, gate, next_weight, scale, eps, h_scale, x_out, y, row_scales):
    batch, tokens, width = x.shape
    block, warps = row_blocks(width)
    with torch.cuda.device_of(x):
        _residual_rms_modulate_kernel[(batch * tokens,)](
            x, h, post_weight, gate, next_weight, scale, x_out, y, row_scales,
            tokens, width, _row_stride(gate), _row_stride(scale), eps * h_scale**2, eps,
            GATE=gate is not None, NEXT=next_weight is not None, SCALE=scale is not None,
            QUANTISE=row_scales is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def add_rms(x, h, weight, eps, x_out, y):
    batch, tokens, width = x.shape
    block, warps = row_blocks(width)
    with torch.cuda.device_of(x):
        _add_rms_kernel[(batch * tokens,)](x, h, weight, x_out, y, width, eps, BLOCK=block, num_warps=warps)


def row_blocks(width):
    """(BLOCK, num_warps) for a row in one program: 16 values a thread at 3840 columns."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)


def _row_stride(tensor):
    return 0 if tensor is None else tensor.stride(0)
