"""The ops of `group_norm` in Triton, arguments as `group_norm` has checked them: three kernels, two passes over x.

Each program of the first takes a run of pixels and gives every channel's mean and sum of squared deviations there;
the second merges these of a group's channels; the third normalises. The first also writes the residual sum.
"""

import torch
import triton
import triton.language as tl

PROGRAMS = 1024  # for an image, if it has as many tiles: about 8 on each multiprocessor of an H100
TILE = 2048  # values: 16 for each thread of 4 warps
MERGED = 4096  # values in a step of the merge


@triton.jit(do_not_specialize=["pixels", "per_program"])
def _moments_kernel(
    x_ptr, h_ptr, shift_ptr, sum_ptr, mean_ptr, square_ptr, pixels, per_program, channels,
    RESIDUAL: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    in_width = channel < channels
    mean = tl.zeros([ROWS, BLOCK_C], tl.float32)
    square = tl.zeros([ROWS, BLOCK_C], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    if SHIFT:
        shift = tl.load(shift_ptr + channel, mask=in_width, other=0.0).to(tl.float32)
    for first in range(0, per_program, ROWS):
        pixel = block * per_program + first + tl.arange(0, ROWS)
        inside = pixel < pixels
        mask = inside[:, None] & in_width[None, :]
        offset = (image * pixels + pixel)[:, None] * channels + channel[None, :]
        value = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:
            value += tl.load(h_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if SHIFT:
            value += shift[None, :]
        if RESIDUAL:
            rounded = value.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + offset, rounded, mask=mask)
            value = rounded.to(tl.float32)
        # Welford's update in every lane: a lane sees the same channel at each step, and counts its own pixels
        count += inside.to(tl.float32)
        deviation = tl.where(mask, value - mean, 0.0)
        mean += deviation * (1.0 / tl.maximum(count, 1.0))[:, None]
        square += deviation * (value - mean)
    seen = tl.sum(count, axis=0)
    merged = tl.sum(mean * count[:, None], axis=0) / seen
    apart = mean - merged[None, :]
    squares = tl.sum(square + apart * apart * count[:, None], axis=0)
    place = (image * tl.num_programs(0) + block) * channels + channel
    tl.store(mean_ptr + place, merged, mask=in_width)
    tl.store(square_ptr + place, squares, mask=in_width)


@triton.jit(do_not_specialize=["pixels", "per_program", "blocks"])
def _merge_kernel(
    mean_ptr, square_ptr, weight_ptr, shift_ptr, centre_ptr, scale_ptr, pixels, per_program, blocks, channels, width,
    eps, SHIFT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """For each channel of a group: y = (x - centre) * scale + bias normalises x as it lies, without its shift."""
    image = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK_W)
    channel = tl.program_id(0) * width + lane
    in_width = lane < width
    total = tl.zeros([BLOCKS, BLOCK_W], tl.float32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        count = tl.minimum(pixels - block * per_program, per_program).to(tl.float32)
        mask = (block < blocks)[:, None] & in_width[None, :]
        place = (image * blocks + block)[:, None] * channels + channel[None, :]
        total += tl.load(mean_ptr + place, mask=mask, other=0.0) * count[:, None]
    values = pixels.to(tl.float32) * width
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / values
    total = tl.zeros([BLOCKS, BLOCK_W], tl.float32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        count = tl.minimum(pixels - block * per_program, per_program).to(tl.float32)
        mask = (block < blocks)[:, None] & in_width[None, :]
        place = (image * blocks + block)[:, None] * channels + channel[None, :]
        apart = tl.load(mean_ptr + place, mask=mask, other=0.0) - mean
        square = tl.load(square_ptr + place, mask=mask, other=0.0)
        total += tl.where(mask, square + apart * apart * count[:, None], 0.0)
    variance = tl.sum(tl.sum(total, axis=1), axis=0) / values
    scale = tl.rsqrt(variance + eps) * tl.load(weight_ptr + channel, mask=in_width, other=0.0).to(tl.float32)
    centre = tl.full([BLOCK_W], 0.0, tl.float32) + mean
    if SHIFT:
        centre -= tl.load(shift_ptr + channel, mask=in_width, other=0.0).to(tl.float32)
    place = image * channels + channel
    tl.store(centre_ptr + place, centre, mask=in_width)
    tl.store(scale_ptr + place, scale, mask=in_width)


@triton.jit(do_not_specialize=["pixels", "per_program"])
def _apply_kernel(
    x_ptr, centre_ptr, scale_ptr, bias_ptr, out_ptr, pixels, per_program, channels,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    in_width = channel < channels
    centre = tl.load(centre_ptr + image * channels + channel, mask=in_width, other=0.0)
    scale = tl.load(scale_ptr + image * channels + channel, mask=in_width, other=0.0)
    bias = tl.load(bias_ptr + channel, mask=in_width, other=0.0).to(tl.float32)
    for first in range(0, per_program, ROWS):
        pixel = block * per_program + first + tl.arange(0, ROWS)
        mask = (pixel < pixels)[:, None] & in_width[None, :]
        offset = (image * pixels + pixel)[:, None] * channels + channel[None, :]
        y = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        y = (y - centre[None, :]) * scale[None, :] + bias[None, :]
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=mask)


def group_norm(x, groups, weight, bias, eps, silu, shift, y):
    _group_norm(x, None, groups, weight, bias, eps, silu, shift, x, y)


def residual_group_norm(x, h, groups, weight, bias, eps, silu, shift, x_out, y):
    _group_norm(x, h, groups, weight, bias, eps, silu, shift, x_out, y)


def _group_norm(x, h, groups, weight, bias, eps, silu, shift, x_out, y):
    batch, channels, height, width = x.shape
    pixels, group = height * width, channels // groups
    rows, block_c = tile(channels)
    per_program = triton.cdiv(triton.cdiv(pixels, PROGRAMS), rows) * rows
    blocks = triton.cdiv(pixels, per_program)
    mean, square = torch.empty((2, batch, blocks, channels), dtype=torch.float32, device=x.device)
    centre, scale = torch.empty((2, batch, channels), dtype=torch.float32, device=x.device)
    block_w = triton.next_power_of_2(group)
    with torch.cuda.device_of(x):
        _moments_kernel[(blocks, batch)](
            x, h, shift, x_out, mean, square, pixels, per_program, channels,
            RESIDUAL=h is not None, SHIFT=shift is not None, ROWS=rows, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
        added = shift if h is None else None  # a residual sum holds its shift already
        _merge_kernel[(groups, batch)](
            mean, square, weight, added, centre, scale, pixels, per_program, blocks, channels, group, eps,
            SHIFT=added is not None, BLOCKS=max(MERGED // block_w, 1), BLOCK_W=block_w, num_warps=8,
        )  # fmt: skip
        _apply_kernel[(blocks, batch)](
            x if h is None else x_out, centre, scale, bias, y, pixels, per_program, channels,
            SILU=silu, ROWS=rows, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip


def tile(channels):
    """(ROWS, BLOCK_C): pixels and channels of a step, all channels of some pixels."""
    block_c = triton.next_power_of_2(channels)
    return max(TILE // block_c, 1), block_c
