"""Keys and values in FP8 with one scale a head, laid out for `attention_triton`."""

import torch
import triton
import triton.language as tl

from .arguments import FP8


@triton.jit
def _quantise_heads_kernel(
    x_ptr, largest_ptr, codes_ptr, scale_ptr, heads, tokens, batch_stride, head_stride, token_stride,
    codes_plane, codes_token, codes_channel, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(1).to(tl.int64)
    token, channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    mask = (token < tokens)[:, None]
    row = plane // heads * batch_stride + plane % heads * head_stride + token.to(tl.int64) * token_stride
    x = tl.load(x_ptr + row[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.load(largest_ptr + plane).to(tl.float32), 1e-12) / 448.0
    if tl.program_id(0) == 0:
        tl.store(scale_ptr + plane, scale)
    codes = (
        codes_ptr + plane * codes_plane + token[:, None].to(tl.int64) * codes_token + channel[None, :] * codes_channel
    )
    tl.store(codes, (x / scale).to(codes_ptr.dtype.element_ty), mask=mask)


def quantise_heads(x, transposed=False, largest=None):
    """FP8 codes and fp32 scales [B, H] of x [B, H, S, D]: x = codes * scale, scale = largest / 448.

    `largest` [B, H], contiguous: a bound on |x| of each head if one is known (a normed, rotated key has at most
    sqrt(D) * max |k_weight|), else its maximum is taken, which costs a read of x. Codes are [B, H, S, D], or with
    `transposed` [B, H, D, S rounded up to 16], the layout in which FP8 tensor cores take values; the rest is unwritten.
    """
    batch, heads, tokens, width = x.shape
    if largest is None:
        largest = torch.linalg.vector_norm(x, float("inf"), dim=(2, 3))
    padded = triton.cdiv(tokens, 16) * 16
    shape = (batch, heads, width, padded) if transposed else (batch, heads, tokens, width)
    codes = torch.empty(shape, dtype=FP8, device=x.device)
    scales = torch.empty((batch, heads), dtype=torch.float32, device=x.device)
    token, channel = (1, padded) if transposed else (width, 1)
    with torch.cuda.device_of(x):
        _quantise_heads_kernel[(triton.cdiv(tokens, 64), batch * heads)](
            x, largest, codes, scales, heads, tokens, *x.stride()[:3], codes.stride(1), token, channel,
            BLOCK=64, WIDTH=width, num_warps=4,
        )  # fmt: skip
    return codes, scales
