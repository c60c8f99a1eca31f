"""The product of few rows with an INT4 weight: which kernel computes it, and in which launch shape.

The shapes follow from how programs fill a GPU's multiprocessors. Their constants come from sweeps over the weights of
Z-Image and Qwen3 on an H100 (benchmarks/kernels_int4.py --sweep).
"""

import torch
import triton

from . import int4_lanes_triton, int4_tiles_triton
from .int4_lanes_triton import STEP

MOST_IN_LANES = 16  # rows up to which each thread's own products were faster


def linear(x, codes, groups, scales, bias, out=None):
    """y [M, N] of contiguous x [M, K] fp16 or bf16, K a multiple of 128, into `out` if given; see int4.linear."""
    (rows, columns), outputs = x.shape, len(codes)
    multiprocessors = 2  # where the interpreter runs
    if x.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    if rows <= MOST_IN_LANES:
        shape = lanes_shape(outputs, columns, multiprocessors)
        return int4_lanes_triton.linear(x, codes, groups, scales, bias, out, **shape)
    shape = tiles_shape(rows, outputs, columns, multiprocessors)
    return int4_tiles_triton.linear(x, codes, groups, scales, bias, out, **shape)


def lanes_shape(outputs: int, columns: int, multiprocessors: int) -> dict[str, int]:
    """Launch parameters of int4_lanes_triton.linear: the number of slices of least estimated time.

    A warp goes through its columns round by round. A round waits for memory as long as three programs on a
    multiprocessor need to compute theirs; to add up slices costs two such rounds.
    """
    steps, blocks = columns // STEP, triton.cdiv(outputs, 16)
    warps = min(4, triton.next_power_of_2(steps))

    def time(slices: int) -> int:
        rounds = triton.cdiv(triton.cdiv(steps, slices), warps)
        return rounds * max(3, triton.cdiv(blocks * slices, multiprocessors)) + (6 if slices > 1 else 0)

    return {"warps": warps, "slices": min((1, 2, 3), key=time)}


def tiles_shape(rows: int, outputs: int, columns: int, multiprocessors: int) -> dict[str, int]:
    """Launch parameters of int4_tiles_triton.linear: those that leave the fewest places for programs idle.

    A multiprocessor computes one program of 8 warps at a time, or two, or three of 4 warps. A slice more must fill 2 %
    more of the places, since its sums have to be added up. More than four slices of fewer than 8 steps are too short:
    then half the outputs in half as many slices give as many programs.
    """

    def filled(warps: int, together: int) -> tuple[float, int, int]:
        places, blocks = together * multiprocessors, triton.cdiv(outputs, 16 * warps) * triton.cdiv(rows, 64)
        slices = max(1, places // blocks)
        return slices * blocks / places - 0.02 * slices, warps, slices

    _, warps, slices = max(filled(8, 1), filled(8, 2), filled(4, 3), key=lambda shape: shape[0])
    steps = columns // STEP
    if slices > 4 and steps < 8 * slices:
        warps, slices = 4, slices // 2
    return {"warps": warps, "slices": min(steps, slices)}
