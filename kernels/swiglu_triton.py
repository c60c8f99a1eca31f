"""`swiglu.silu_mul` in Triton: one program a row. Arguments as `swiglu` has checked them.

A row is held in two pieces whose lengths are powers of two, so that 10240 columns take 8192 + 2048 lanes, not 16384,
and the quantised form too reads every value once.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _gated(a_ptr, b_ptr, column, width, factor):
    mask = column < width
    a = tl.load(a_ptr + column, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + column, mask=mask, other=0.0).to(tl.float32)
    return a * tl.sigmoid(a) * b * factor


@triton.jit
def _silu_mul_kernel(
    a_ptr, b_ptr, out_ptr, row_scale_ptr, width, a_stride, b_stride, factor,
    QUANTISE: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    a_ptr += row * a_stride
    b_ptr += row * b_stride
    out_ptr += row * width
    column = tl.arange(0, HEAD)
    head = _gated(a_ptr, b_ptr, column, width, factor)
    if TAIL:
        tail_column = HEAD + tl.arange(0, TAIL)
        tail = _gated(a_ptr, b_ptr, tail_column, width, factor)
    if QUANTISE:
        largest = tl.maximum(tl.max(tl.abs(head), axis=0), 1e-12)
        if TAIL:
            largest = tl.maximum(largest, tl.max(tl.abs(tail), axis=0))
        row_scale = largest / 448.0
        tl.store(row_scale_ptr + row, row_scale)
        head = head * (1.0 / row_scale)  # the conversion saturates and keeps NaN
        if TAIL:
            tail = tail * (1.0 / row_scale)
    tl.store(out_ptr + column, head.to(out_ptr.dtype.element_ty), mask=column < width)
    if TAIL:
        tl.store(out_ptr + tail_column, tail.to(out_ptr.dtype.element_ty), mask=tail_column < width)


def silu_mul(a, b, factor, y, row_scales):
    rows, width = a.shape
    head, tail, warps = row_pieces(width)
    with torch.cuda.device_of(a):
        _silu_mul_kernel[(rows,)](
            a, b, y, row_scales, width, a.stride(0), b.stride(0), factor,
            QUANTISE=row_scales is not None, HEAD=head, TAIL=tail, num_warps=warps,
        )  # fmt: skip


def row_pieces(width):
    """(HEAD, TAIL, num_warps): the largest power of two in width, one that covers the rest (or 0), the warps."""
    head = triton.next_power_of_2(width + 1) // 2
    tail = triton.next_power_of_2(width - head) if width > head else 0
    return head, tail, min(max(head // 512, 1), 16)
