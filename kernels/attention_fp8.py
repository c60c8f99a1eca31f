"""Attention whose queries, keys and values are FP8 codes with the scales that `heads` describes: by a kernel's name.

A kernel is a function (q, k, v, lengths, out, row_scales, factor) of such pairs, v's transposed, codes contiguous, with
lengths [B] or None as in `attention` (`ATTENTION.refusals` knows which kernel takes none). It writes
softmax(q kᵀ / sqrt(D)) v into out [B, H, S, D], which lies by tokens in memory: in 16 bit, or with row_scales [B S, 1]
as FP8 codes of `factor` times that.
"""

import torch

from .arguments import FP8
from .heads import quantise_heads
from .registry import lazily

KERNELS = {
    "hopper-fp8": lazily("attention_fp8_hopper_triton", "launch"),
    "triton-fp8": lazily("attention_fp8_triton", "launch"),
}


def attention(kernel, q, k, v, lengths):
    """softmax(q kᵀ / sqrt(D)) v of 16-bit q, k, v."""
    return attention_of_codes(kernel, quantise_heads(q), quantise_heads(k), v, lengths)


def attention_of_codes(kernel, q, k, v, lengths=None, out=None):
    """The same of pairs q and k, and of v in 16 bit; out [B, H, S, D]: to be written into."""
    if out is None:
        out = _by_tokens(q[0], v.dtype)
    KERNELS[kernel](q, k, quantise_heads(v, transposed=True), lengths, out, None, 1.0)
    return out


def rows_of_codes(kernel, q, k, v, factor, out=None):
    """FP8 rows of `factor` times the same: (codes [B, S, H, D], row scales [B S, 1]) for the next product.

    An image's rows share their scale, its largest value's: what attention gives lies within the values, and FP8 keeps
    its precision over 15 binades below. So it is known beforehand, and the result is written once. out: both, to be
    written into.
    """
    if out is None:
        codes = _by_tokens(q[0], FP8).transpose(1, 2)
        out = codes, torch.empty(codes.shape[:2].numel(), 1, device=codes.device)
    codes, row_scales = out
    v = quantise_heads(v, transposed=True)
    KERNELS[kernel](q, k, v, None, codes.transpose(1, 2), row_scales, factor)
    return out


def _by_tokens(q, dtype):
    """Space for a result [B, H, S, D] that lies in memory as [B, S, H, D]."""
    batch, heads, tokens, width = q.shape
    return torch.empty((batch, tokens, heads, width), dtype=dtype, device=q.device).transpose(1, 2)
