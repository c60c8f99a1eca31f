"""`swiglu_linear` in Triton for Hopper: both products of a tile stay in the tensor core's sums until y is made of them.

In FP8 too, whose products are scaled there: y is bf16, and a pass behind makes FP8 rows of it.

A program goes from tile to tile of y. The copy engine brings the rows of both weights that a tile needs in one box of
three dimensions, whose first is which weight, so that they are one operand of the widest product there is (64 x 256 x
16, of FP8 32). The weights need not lie beside each other in memory: what is between them is the box's stride.

Which weight comes first is not known before a call, and no reason to compile another kernel, which nothing may be while
a CUDA graph is captured.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .fp8 import quantise_rows

ROWS, OUTPUTS = 128, 128  # of a tile of y
STEP = 128  # bytes of a row that a step of its sums takes
GROUP = 16  # rows of tiles at most that go through the weights together, which the L2 cache then has for all of them


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: a group of rows of tiles, column after column, then the next group.

    Groups are about even: one of a single row would go through the weights as fast as memory gives them.
    """
    group = tl.cdiv(tiles_m, tl.cdiv(tiles_m, GROUP))
    of_group = group * tiles_n
    first = tile // of_group * group
    count = tl.minimum(tiles_m - first, group)
    return first + tile % of_group % count, tile % of_group // count


@triton.jit(do_not_specialize=["rows", "programs", "value_first"])
def _swiglu_linear_kernel(
    x_desc, weights_desc, y_desc, x_scales_ptr, first_scales_ptr, second_scales_ptr,
    rows, outputs, columns, programs, value_first, factor, SCALED: tl.constexpr, TENSOR_CORES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, programs):
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        total = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for k in range(0, columns, BLOCK_K):
            x = x_desc.load([m * BLOCK_M, k])
            weights = weights_desc.load([0, n * BLOCK_N, k]).reshape(2 * BLOCK_N, BLOCK_K)
            if not TENSOR_CORES:
                x, weights = x.to(tl.float32), weights.to(tl.float32)
            total = tl.dot(x, weights.T, total)
        first, second = tl.split(total.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1))  # a thread has both
        if SCALED:
            row, output = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
            x_scale = tl.load(x_scales_ptr + row, mask=row < rows, other=0.0)[:, None]
            first *= x_scale * tl.load(first_scales_ptr + output, mask=output < outputs, other=0.0)[None, :]
            second *= x_scale * tl.load(second_scales_ptr + output, mask=output < outputs, other=0.0)[None, :]
        gate = tl.where(value_first != 0, second, first)
        y = first * second * tl.sigmoid(gate) * factor
        y_desc.store([m * BLOCK_M, n * BLOCK_N], y.to(y_desc.dtype))


def linear(x, gate_weight, value_weight, factor):
    return _fused((x, None), (gate_weight, None), (value_weight, None), factor, x.dtype)


def linear_fp8(x, gate_weight, value_weight, factor, dtype):
    return quantise_rows(_fused(x, gate_weight, value_weight, factor, torch.bfloat16))


def _fused(x, gate_weight, value_weight, factor, dtype):
    """Each with its scales, or None for them."""
    (first, first_scales), (second, second_scales) = sorted(
        (gate_weight, value_weight), key=lambda weight: weight[0].data_ptr()
    )
    x, x_scales = x
    (rows, columns), outputs = x.shape, len(first)
    y = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    stride = (second.data_ptr() - first.data_ptr()) // x.element_size()
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(outputs, OUTPUTS)
    multiprocessors = 2  # where the interpreter runs
    if x.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs, step = min(tiles, multiprocessors), STEP // x.element_size()
    with torch.cuda.device_of(x):
        _swiglu_linear_kernel[(programs,)](
            TensorDescriptor.from_tensor(x, [ROWS, step]),
            TensorDescriptor(first, [2, outputs, columns], [stride, columns, 1], [2, OUTPUTS, step]),
            TensorDescriptor.from_tensor(y, [ROWS, OUTPUTS]), x_scales, first_scales, second_scales,
            rows, outputs, columns, programs, int(first is value_weight[0]), factor,
            SCALED=x_scales is not None, TENSOR_CORES=x.is_cuda,
            BLOCK_M=ROWS, BLOCK_N=OUTPUTS, BLOCK_K=step, GROUP=GROUP, num_warps=8, num_stages=3,
        )  # fmt: skip
    return y
