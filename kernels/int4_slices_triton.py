"""The last step of an INT4 product whose columns were cut into slices: their sums, always in the same order."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .int4_early_triton import early


@triton.jit
def _sum_slices_kernel(
    partial_ptr, scales_ptr, bias_ptr, y_ptr, rows, outputs, slices,
    BIAS: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
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


def sum_slices(partial, scales, bias, y):
    """y [M, N] = the sum over slices of partial [slices, M, N] float32, times scales [N], plus bias [N] or None."""
    slices, rows, outputs = partial.shape
    slices_block = triton.next_power_of_2(slices)
    block = max(16, 1024 // slices_block)
    _sum_slices_kernel[(triton.cdiv(outputs, block), rows)](
        partial, scales, scales if bias is None else bias, y, rows, outputs, slices,
        BIAS=bias is not None, SLICES=slices_block, BLOCK=block, **early(y),
    )  # fmt: skip
