"""The product of few rows with an INT4 weight: which kernel computes it, and in which launch shape.

The shapes follow from how programs fill a GPU's multiprocessors. Their constants come from sweeps over the weights of
Z-Image and Qwen3 on an H100 (benchmarks/kernels_int4.py --sweep).
"""

import itertools
from functools import lru_cache

import torch
import triton

from . import int4_lanes_triton, int4_tiles_triton
from .int4_lanes_triton import STEP

MOST_IN_LANES = 8  # rows up to which each thread's own products were faster
MOST_UNARRANGED = 2**18  # results up to which tiles were faster with x put into order by each program
MOST_SLICES = 8  # 12 were hardly faster


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


@lru_cache
def tiles_shape(rows: int, outputs: int, columns: int, multiprocessors: int) -> dict[str, int]:
    """Launch parameters of int4_tiles_triton.linear: those with which the most of a GPU's time goes into products.

    A multiprocessor is as fast with one program of 8 warps as with three or five of 4 warps, and a fifth slower with
    one of those. Programs come in waves that fill these places, the last of them in part. Each needs a step's time more
    than its steps. To add up slices costs more the more rows there are to the columns of a product.

    To arrange x beforehand takes a launch more, and saves every program to do so: it pays where there are many results.
    """
    steps = columns // STEP

    def useful(warps: int, together: int, speed: float, slices: int) -> float:
        steps_in_slice = triton.cdiv(steps, slices)
        slices = triton.cdiv(steps, steps_in_slice)
        programs = triton.cdiv(outputs, 16 * warps) * triton.cdiv(rows, 64) * slices
        places = together * multiprocessors
        filled = programs / (places * triton.cdiv(programs, places))
        share = steps / (slices * (steps_in_slice + 1))
        return speed * filled * share - (2 * rows / columns * slices if slices > 1 else 0)

    shapes = itertools.product(((8, 1, 1), (4, 1, 0.8), (4, 3, 1), (4, 5, 1)), range(1, min(steps, MOST_SLICES) + 1))
    (warps, _, _), slices = max(shapes, key=lambda shape: useful(*shape[0], shape[1]))
    return {"warps": warps, "slices": slices, "arranged": rows * outputs > MOST_UNARRANGED}
