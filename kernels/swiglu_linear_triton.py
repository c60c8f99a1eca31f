"""`swiglu.linear` in Triton for Hopper: both products of a tile stay in the tensor core's sums until y is made of them.

In FP8 too, whose products are scaled there: y is bf16, and a pass behind makes FP8 rows of it.

A program goes from tile to tile of y. The copy engine brings the rows of both weights that a tile needs in one box of
three dimensions, whose first is which weight, so that they are one operand of the widest product there is (64 x 256 x
16, of FP8 32). The weights need not lie beside each other in memory: what is between them is the box's stride.

Tiles are taken in groups of 16 rows of tiles, which share weights in the L2 cache. On an H100 the board's power decides
how fast such products are, cuBLAS's as well; what is saved is the writing and reading of both of them.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .fp8 import quantise_rows

ROWS, OUTPUTS = 128, 128  # of a tile of y
STEP = 128  # bytes of a row that a step of its sums takes
GROUP = 16  # of 4, 8, 16 and 33 the fastest at 1088 to 16448 rows


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles, column after column, then the next rows."""
    of_group = GROUP * tiles_n
    first = tile // of_group * GROUP
    count = tl.minimum(tiles_m - first, GROUP)
    return first + tile % of_group % count, tile % of_group // count


@triton.jit(do_not_specialize=["rows", "programs"])
def _swiglu_linear_kernel(
    x_desc, weights_desc, y_desc, x_scales_ptr, gate_scales_ptr, value_scales_ptr,
    rows, outputs, columns, programs, factor, SCALED: tl.constexpr,
    VALUE_FIRST: tl.constexpr, TENSOR_CORES: tl.constexpr,
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
        gate, value = tl.split(total.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1))  # a thread has both
        if VALUE_FIRST:
            gate, value = value, gate
        if SCALED:
            row, output = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
            x_scale = tl.load(x_scales_ptr + row, mask=row < rows, other=0.0)[:, None]
            gate *= x_scale * tl.load(gate_scales_ptr + output, mask=output < outputs, other=0.0)[None, :]
            value *= x_scale * tl.load(value_scales_ptr + output, mask=output < outputs, other=0.0)[None, :]
        y_desc.store([m * BLOCK_M, n * BLOCK_N], (gate * tl.sigmoid(gate) * value * factor).to(y_desc.dtype))


def linear(x, gate_weight, value_weight, factor):
    return _fused(x, gate_weight, value_weight, None, factor, x.dtype)


def linear_fp8(x, gate_weight, value_weight, factor, dtype):
    codes, scales = zip(x, gate_weight, value_weight, strict=True)
    return quantise_rows(_fused(*codes, scales, factor, torch.bfloat16))


def _fused(x, gate_weight, value_weight, scales, factor, dtype):
    (rows, columns), outputs = x.shape, len(gate_weight)
    y = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    first, second = sorted((gate_weight, value_weight), key=torch.Tensor.data_ptr)
    apart = (second.data_ptr() - first.data_ptr()) // x.element_size()
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(outputs, OUTPUTS)
    multiprocessors = 2  # where the interpreter runs
    if x.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs, step = min(tiles, multiprocessors), STEP // x.element_size()
    with torch.cuda.device_of(x):
        _swiglu_linear_kernel[(programs,)](
            TensorDescriptor.from_tensor(x, [ROWS, step]),
            TensorDescriptor(first, [2, outputs, columns], [apart, columns, 1], [2, OUTPUTS, step]),
            TensorDescriptor.from_tensor(y, [ROWS, OUTPUTS]),
            *(scales or (None, None, None)), rows, outputs, columns, programs, factor, SCALED=scales is not None,
            VALUE_FIRST=first is value_weight, TENSOR_CORES=x.is_cuda,
            BLOCK_M=ROWS, BLOCK_N=OUTPUTS, BLOCK_K=step, GROUP=GROUP, num_warps=8, num_stages=3,
        )  # fmt: skip
    return y
