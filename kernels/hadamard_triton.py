"""hadamard.rotate and fp8.quantise_rows in one pass over x: one program a row, in fp32 registers.

A block of 256 is a matrix [16, 16], rotated by the Hadamard matrix of 16 on both sides, each in 4 rounds of sums and
differences of neighbours. Arguments as `fp8` and `hadamard` have checked them.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _rotate_rows(x, BLOCKS: tl.constexpr):
    """x [BLOCKS, 16, 16] times the unscaled Hadamard matrix along the last dimension.

    A round sends the sums of neighbours to the first half and the differences to the second, so that after four rounds
    every bit of the index has had its turn and is back in its place.
    """
    for _ in tl.static_range(4):
        left, right = tl.split(x.reshape(BLOCKS, 16, 8, 2))
        x = tl.join(left + right, left - right).permute(0, 1, 3, 2).reshape(BLOCKS, 16, 16)
    return x


@triton.jit
def _rotate_quantise_kernel(x_ptr, codes_ptr, scales_ptr, columns, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)[:, None, None] * 256
    column = block + tl.arange(0, 16)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    mask = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=mask, other=0.0).to(tl.float32)
    x = _rotate_rows(x, BLOCKS)
    x = _rotate_rows(x.permute(0, 2, 1), BLOCKS).permute(0, 2, 1)  # 16 times the rotated x
    largest = tl.maximum(tl.max(tl.abs(x).reshape(BLOCKS * 256), axis=0) * 0.0625, 1e-12)
    tl.store(scales_ptr + row, largest / 448.0)
    tl.store(codes_ptr + row * columns + column, (x * (28.0 / largest)).to(codes_ptr.dtype.element_ty), mask=mask)


def rotate_quantise_rows(x, codes, scales):
    """FP8 codes [M, K] and scales [M, 1] of the rotated rows of contiguous x [M, K], K a multiple of 256."""
    blocks = triton.next_power_of_2(x.shape[1] // 256)
    with torch.cuda.device_of(x):
        _rotate_quantise_kernel[(len(x),)](
            x, codes, scales, x.shape[1], BLOCKS=blocks, num_warps=min(16, max(1, blocks // 4))
        )  # fmt: skip
    return codes, scales
