"""`swiglu.linear` in Triton for Hopper: both products of a tile stay in the tensor core's sums until y is made of them.

A program goes from tile to tile of y. The copy engine brings the rows of both weights that a tile needs in one box of
three dimensions, whose first is which weight, so that they are one operand of the widest product there is (64 x 256 x
16). The weights need not lie beside each other in memory: what is between them is the box's stride.

Tiles are taken in groups of 16 rows of tiles, which share weights in the L2 cache. On an H100 the board's power decides
how fast such products are; what is saved is the writing and reading of both of them (benchmarks/kernels_fused.py).
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS, OUTPUTS, COLUMNS = 128, 128, 64  # of a tile of y, and of a step of its sums
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
    x_desc, weights_desc, y_desc, rows, outputs, columns, programs, factor,
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
        y_desc.store([m * BLOCK_M, n * BLOCK_N], (gate * tl.sigmoid(gate) * value * factor).to(y_desc.dtype))


def linear(x, gate_weight, value_weight, factor):
    (rows, columns), outputs = x.shape, len(gate_weight)
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    first, second = sorted((gate_weight, value_weight), key=torch.Tensor.data_ptr)
    apart = (second.data_ptr() - first.data_ptr()) // x.element_size()
    tiles = triton.cdiv(rows, ROWS) * triton.cdiv(outputs, OUTPUTS)
    multiprocessors = 2  # where the interpreter runs
    if x.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    programs = min(tiles, multiprocessors)
    with torch.cuda.device_of(x):
        _swiglu_linear_kernel[(programs,)](
            TensorDescriptor.from_tensor(x, [ROWS, COLUMNS]),
            TensorDescriptor(first, [2, outputs, columns], [apart, columns, 1], [2, OUTPUTS, COLUMNS]),
            TensorDescriptor.from_tensor(y, [ROWS, OUTPUTS]),
            rows, outputs, columns, programs, factor, VALUE_FIRST=first is value_weight, TENSOR_CORES=x.is_cuda,
            BLOCK_M=ROWS, BLOCK_N=OUTPUTS, BLOCK_K=COLUMNS, GROUP=GROUP, num_warps=8, num_stages=3,
        )  # fmt: skip
    return y
