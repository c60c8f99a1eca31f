"""`heads.quantise_heads` in Triton: one program a block of tokens of a head. Arguments as `heads` has checked them."""

import torch
import triton
import triton.language as tl

from .heads import BLOCK


@triton.jit
def in_token_order(x, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """x [ROWS, TOKENS] with every 32 tokens in `heads.TOKEN_ORDER`."""
    x = tl.permute(tl.reshape(x, (ROWS, TOKENS // 32, 2, 2, 4, 2)), (0, 1, 2, 4, 3, 5))
    return tl.reshape(x, (ROWS, TOKENS))


@triton.jit
def _quantise_heads_kernel(
    x_ptr, codes_ptr, scale_ptr, heads, tokens, batch_stride, head_stride, token_stride,
    TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    block, blocks, plane = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    token, channel = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROUND)
    mask = (token < tokens)[:, None] & (channel < WIDTH)[None, :]
    row = plane // heads * batch_stride + plane % heads * head_stride + token.to(tl.int64) * token_stride
    x = tl.load(x_ptr + row[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x)), 1e-12) / 448.0
    scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + plane * blocks + block, scale)
    x = x * (1.0 / scale)
    if TRANSPOSED:
        codes = in_token_order(tl.trans(x), ROUND, BLOCK).to(codes_ptr.dtype.element_ty)
        place = (plane * WIDTH + channel) * (blocks * BLOCK) + block * BLOCK
        tl.store(codes_ptr + place[:, None] + tl.arange(0, BLOCK)[None, :], codes, mask=(channel < WIDTH)[:, None])
    else:
        place = (plane * tokens + token) * WIDTH
        tl.store(codes_ptr + place[:, None] + channel[None, :], x.to(codes_ptr.dtype.element_ty), mask=mask)


def quantise_heads(x, codes, scales, transposed):
    batch, heads, tokens, width = x.shape
    with torch.cuda.device_of(x):
        _quantise_heads_kernel[(scales.shape[2], batch * heads)](
            x, codes, scales, heads, tokens, *x.stride()[:3],
            TRANSPOSED=transposed, BLOCK=BLOCK, WIDTH=width, ROUND=triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip
