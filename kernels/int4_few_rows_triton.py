"""The product of few rows with an INT4 weight: which kernel computes it, and in which launch shape."""

import torch
import triton

from . import int4_lanes_triton, int4_tiles_triton
from .int4_lanes_triton import STEP

MOST_IN_LANES = 8  # rows up to which each thread's own products were faster on an H100


def linear(x, codes, groups, scales, bias, out=None):
    """y [M, N] of contiguous x [M, K] fp16 or bf16, K a multiple of 128, into `out` if given; see int4.linear."""
    rows, columns = x.shape
    multiprocessors = 2  # where the interpreter runs
    if x.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    if rows > MOST_IN_LANES:
        shape = tiles_shape(rows, len(codes), columns, multiprocessors)
        return int4_tiles_triton.linear(x, codes, groups, scales, bias, out, **shape)
    shape = lanes_shape(len(codes), columns, multiprocessors)
    return int4_lanes_triton.linear(x, codes, groups, scales, bias, out, **shape)


def tiles_shape(rows: int, outputs: int, columns: int, multiprocessors: int) -> dict[str, int]:
    """Launch parameters of int4_tiles_triton.linear, read off a sweep on an H100: a slice for each multiprocessor, or
    where that leaves some idle, two."""
    blocks = triton.cdiv(outputs, 128) * triton.cdiv(rows, 64)
    slices = multiprocessors // blocks if 2 * blocks <= multiprocessors else 2 * multiprocessors // blocks
    return {"warps": 8, "slices": max(1, min(columns // STEP, slices)), "stages": 3}


def lanes_shape(outputs: int, columns: int, multiprocessors: int) -> dict[str, int]:
    """Launch parameters of int4_lanes_triton.linear, from sweeps over the weights of Z-Image and Qwen3 on an H100.

    The warps of a program share out the columns: 8 where there are few blocks of 16 outputs, and two slices where there
    are fewer still.
    """
    steps, blocks = columns // STEP, triton.cdiv(outputs, 16)
    along = min(8 if blocks < 2 * multiprocessors else 4, triton.next_power_of_2(steps))
    slices = 2 if 2 * blocks < 3 * multiprocessors and steps >= 2 * along else 1
    return {"eights": 1, "tiles": 1, "across": 1, "along": along, "slices": slices}
