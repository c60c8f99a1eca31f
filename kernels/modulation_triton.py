"""`modulation.products` in Triton: a program makes some outputs of one layer, for every row. Checked by `modulation`.

Weights are read where they lie. Their addresses are arguments of the launch, of which a program takes its layer's: no
table in memory has to follow the weights, and a CUDA graph keeps addresses as it keeps any argument.
"""

import torch
import triton
import triton.language as tl

TILE, WARPS = 64 * 256, 4  # weights of a program: each thread has 16 loads of 16 bytes under way


@triton.jit
def _of_layer(pointers, layer):
    pointer = pointers[0]
    for other in tl.static_range(1, len(pointers)):
        pointer = tl.where(layer == other, pointers[other], pointer)
    return pointer


@triton.jit
def _products_kernel(
    x_ptr, weight_ptrs, bias_ptrs, out_ptr, rows, outputs, columns, x_stride, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    first, layer = tl.program_id(0) * BLOCK, tl.program_id(1)
    place, column = tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    inside, present = first + place < outputs, column < columns
    weight_ptr = _of_layer(weight_ptrs, layer) + first.to(tl.int64) * columns + place[:, None] * columns
    weight = tl.load(weight_ptr + column[None, :], mask=inside[:, None] & present[None, :], other=0.0).to(tl.float32)
    bias = tl.load(_of_layer(bias_ptrs, layer) + first + place, mask=inside, other=0.0).to(tl.float32)
    out_ptr += layer.to(tl.int64) * rows * outputs + first + place
    for row in range(rows):
        x = tl.load(x_ptr + row * x_stride + column, mask=present, other=0.0).to(tl.float32)
        y = tl.sum(weight * x[None, :], axis=1) + bias
        tl.store(out_ptr + row * outputs, y.to(out_ptr.dtype.element_ty), mask=inside)


def products(x, weights, biases, y, tile=TILE, warps=WARPS):
    """`tile`, `warps`: if others than the rule's are to be measured."""
    (rows, columns), outputs = x.shape, len(weights[0])
    padded = triton.next_power_of_2(columns)
    block = max(tile // padded, 1)
    with torch.cuda.device_of(x):
        _products_kernel[(triton.cdiv(outputs, block), len(weights))](
            x, tuple(weights), tuple(biases), y, rows, outputs, columns, x.stride(0),
            BLOCK=block, COLUMNS=padded, num_warps=warps,
        )  # fmt: skip
