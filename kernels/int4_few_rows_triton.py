"""The product of few rows with an INT4 weight: which kernel computes it, and in which launch shape."""

import torch
import triton

from . import int4_lanes_triton, int4_terms_triton
from .int4_lanes_triton import STEP

MOST_IN_LANES = 16  # rows up to which decoding to 16 bits in each thread was faster on an H100 than two FP8 terms


def linear(x, codes, groups, scales, bias, out=None):
    """y [M, N] of contiguous x [M, K] fp16 or bf16, K a multiple of 128, into `out` if given; see int4.linear."""
    rows, columns = x.shape
    multiprocessors, hopper = 2, True  # where the interpreter runs
    if x.is_cuda:
        properties = torch.cuda.get_device_properties(x.device)
        multiprocessors, hopper = properties.multi_processor_count, properties.major == 9
    if rows > MOST_IN_LANES and x.dtype == torch.bfloat16 and hopper:  # FP8 products of weights in registers
        shape = terms_shape(rows, len(codes), columns, multiprocessors)
        return int4_terms_triton.linear(x, codes, groups, scales, bias, out, **shape)
    shape = lanes_shape(rows, len(codes), columns, multiprocessors)
    return int4_lanes_triton.linear(x, codes, groups, scales, bias, out, **shape)


def terms_shape(rows: int, outputs: int, columns: int, multiprocessors: int) -> dict[str, int]:
    """Launch parameters of int4_terms_triton.linear: as many slices as let all programs run at once, three on each."""
    blocks = triton.cdiv(outputs, int4_terms_triton.OUTPUTS) * triton.cdiv(rows, 64)
    return {"slices": max(1, min(columns // STEP, 3 * multiprocessors // blocks))}


def lanes_shape(rows: int, outputs: int, columns: int, multiprocessors: int) -> dict[str, int]:
    """Launch parameters of int4_lanes_triton.linear, from sweeps over the weights of Z-Image and Qwen3 on an H100.

    Up to 16 rows the warps of a program share out the columns: 8 where there are few blocks of 16 outputs, and two
    slices where there are fewer still; two blocks a warp where one each would not all run at once. More rows are worth
    sharing between warps with different outputs.
    """
    steps, blocks = columns // STEP, triton.cdiv(outputs, 16)
    if rows > 16:
        programs = triton.cdiv(outputs, 128) * triton.cdiv(rows, 64)
        slices = max(1, min(steps, 2 * multiprocessors // programs))
        return {"eights": 4 if rows <= 32 else 8, "tiles": 2, "across": 4, "along": 1, "slices": slices}
    eights = 1 if rows <= 8 else 2
    tiles = 2 if eights == 2 and blocks > 5 * multiprocessors else 1
    along = min(8 if blocks < 2 * multiprocessors else 4, triton.next_power_of_2(steps))
    slices = 2 if 2 * blocks < 3 * multiprocessors and steps >= 2 * along else 1
    return {"eights": eights, "tiles": tiles, "across": 1, "along": along, "slices": slices}
