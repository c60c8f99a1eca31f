"""Queries, keys and values in FP8 (e4m3fn), one scale for each block of tokens of a head, as FP8 attention reads them.

A pair (codes, scales) stands for codes * scale of the token's block. Of values the codes are transposed, the layout in
which FP8 tensor cores take a second operand, and within 32 tokens reordered: `TOKEN_ORDER` says why and how.
"""

import torch

from .arguments import FP8, FP8_MAX, described
from .registry import Registry, Request, lazily, no_refusal, triton_refusal

BLOCK = 64  # tokens with a scale in common
QUANTISE_HEADS = Registry("quantise_heads")

# The tensor core leaves 2 neighbouring columns of each 8 in a thread, and takes 4 of each 16: where the softmax weights
# are to be multiplied again without a move between threads, place 16 h + 4 t + 2 e + b of 32 stands for token
# 16 h + 8 e + 2 t + b (h, e, b in 0 and 1; t from 0 to 3).
TOKEN_ORDER = torch.arange(32).view(2, 2, 4, 2).transpose(1, 2).flatten()


def quantise_heads(x, transposed=False, backend="auto"):
    """(codes, scales [B, H, blocks] fp32) of x [B, H, S, D] (any strides but a last of 1), D a multiple of 16.

    A block's scale is the power of two from its largest magnitude / 448 (of zeros: of 1e-12) upwards. Codes are
    [B, H, S, D] contiguous; with `transposed` [B, H, D, S padded to whole blocks] in TOKEN_ORDER, zeros in the padding.
    Raises ValueError otherwise.
    """
    if x.ndim != 4 or not x.is_floating_point() or x.stride(-1) != 1 or x.shape[-1] % 16:
        raise ValueError(
            f"quantise_heads: expected floats [B, H, S, D] with unit stride in a D that is a multiple of 16, "
            f"got {described(x)}"
        )
    batch, heads, tokens, width = x.shape
    blocks = -(-tokens // BLOCK)
    shape = (batch, heads, width, blocks * BLOCK) if transposed else x.shape
    codes = torch.empty(shape, dtype=FP8, device=x.device)
    scales = torch.empty((batch, heads, blocks), dtype=torch.float32, device=x.device)
    QUANTISE_HEADS.choose(backend, Request(x.device, quantise=True)).function(x, codes, scales, transposed)
    return codes, scales


def quantise_heads_reference(x, codes, scales, transposed):
    tokens, blocks = x.shape[2], scales.shape[2]
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, blocks * BLOCK - tokens)).unflatten(2, (blocks, BLOCK))
    scales.copy_(power_of_two(padded.abs().amax((3, 4)).clamp(min=1e-12) / FP8_MAX))
    values = (padded / scales[..., None, None]).flatten(2, 3)
    if transposed:
        values = values.unflatten(2, (-1, 32))[:, :, :, TOKEN_ORDER].flatten(2, 3).transpose(2, 3)
    else:
        values = values[:, :, :tokens]
    codes.copy_(values.clamp(-FP8_MAX, FP8_MAX))


def power_of_two(x):
    """The least power of two that is not below x, for positive normal fp32."""
    return ((x.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


QUANTISE_HEADS.register("triton", lazily("heads_triton", "quantise_heads"), triton_refusal)
QUANTISE_HEADS.register("torch", quantise_heads_reference, no_refusal)
