"""`upsample.upsample` in Triton: each value is read once and written to its four places. Arguments as checked there."""

import torch
import triton
import triton.language as tl

from .group_norm_triton import tile


@triton.jit(do_not_specialize=["pixels", "width"])
def _upsample_kernel(
    x_ptr, h_ptr, shift_ptr, out_ptr, pixels, width, channels,
    RESIDUAL: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    offset = pixel[:, None] * channels + channel[None, :]
    value = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(h_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if SHIFT:
        value += tl.load(shift_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    value = value.to(out_ptr.dtype.element_ty)
    line = pixel // width  # over all images, as the next picture's lines follow
    place = (line * 4 * width + (pixel - line * width) * 2)[:, None] * channels + channel[None, :]
    below = place + 2 * width * channels
    tl.store(out_ptr + place, value, mask=mask)
    tl.store(out_ptr + place + channels, value, mask=mask)
    tl.store(out_ptr + below, value, mask=mask)
    tl.store(out_ptr + below + channels, value, mask=mask)


def upsample(x, h, shift, y):
    batch, channels, height, width = x.shape
    rows, block_c = tile(channels)
    pixels = batch * height * width
    with torch.cuda.device_of(x):
        _upsample_kernel[(triton.cdiv(pixels, rows),)](
            x, h, shift, y, pixels, width, channels,
            RESIDUAL=h is not None, SHIFT=shift is not None, ROWS=rows, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
