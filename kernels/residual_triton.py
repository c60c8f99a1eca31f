"""`residual.add` in Triton, its programs as those of `norm_triton`. Arguments as `residual` has checked them."""

import torch
import triton
import triton.language as tl

from .norm_triton import columns, gain_of_columns, gain_of_half, row_split, row_stride
from .residual import SMALLEST


@triton.jit
def _reversible(gain, SMALLEST: tl.constexpr):
    return tl.where(tl.abs(gain) < SMALLEST, SMALLEST, gain)


@triton.jit(do_not_specialize=["tokens"])
def _add_kernel(
    x_ptr, x_rms_ptr, x_weight_ptr, x_scale_ptr, h_ptr, post_weight_ptr, gate_ptr, next_weight_ptr, scale_ptr,
    out_ptr, rms_ptr, tokens, width, x_scale_stride, gate_stride, scale_stride, eps,
    HELD: tl.constexpr, X_SCALE: tl.constexpr, GATE: tl.constexpr, NEXT: tl.constexpr, SCALE: tl.constexpr,
    SMALLEST: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    column = columns(x_ptr, BLOCK)
    mask = column < width
    h_gain = gain_of_half(post_weight_ptr, gate_ptr, gate_stride, image, column, mask, GATE)
    if HELD:
        x_gain = gain_of_columns(x_weight_ptr, x_scale_ptr, x_scale_stride, image, column, mask, True, X_SCALE, BLOCK)
        x_factor = 1.0 / _reversible(x_gain, SMALLEST)
    if NEXT:
        gain = gain_of_columns(next_weight_ptr, scale_ptr, scale_stride, image, column, mask, True, SCALE, BLOCK)
        gain = _reversible(gain, SMALLEST)
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0), num_stages=STAGES):
        row = image * tokens + token
        start = row * width
        h = tl.load(h_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + start + column, mask=mask, other=0.0).to(tl.float32)
        if HELD:
            x *= x_factor * tl.load(x_rms_ptr + row)
        x += h * tl.rsqrt(tl.sum(h * h, axis=0) / width + eps) * h_gain
        if NEXT:
            factor = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
            tl.store(rms_ptr + row, 1.0 / factor)
            x *= gain * factor
        tl.store(out_ptr + start + column, x.to(out_ptr.dtype.element_ty), mask=mask)


def add(x, h, post_weight, gate, next_weight, scale, eps, y, rms, split=None):
    """`split`: rows of a program, warps and stages, if others than the rule's are to be measured."""
    batch, tokens, width = h.shape
    rows, warps, stages = split or row_split(tokens, width)
    with torch.cuda.device_of(h):
        _add_kernel[(triton.cdiv(tokens, rows), batch)](
            x.y, x.rms, x.weight, x.scale, h, post_weight, gate, next_weight, scale, y, rms,
            tokens, width, row_stride(x.scale), row_stride(gate), row_stride(scale), eps,
            HELD=x.rms is not None, X_SCALE=x.scale is not None, GATE=gate is not None,
            NEXT=next_weight is not None, SCALE=scale is not None, SMALLEST=SMALLEST,
            BLOCK=triton.next_power_of_2(width), STAGES=stages, num_warps=warps,
        )  # fmt: skip
