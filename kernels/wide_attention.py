"""Attention of one head too wide for fused kernels, as a VAE has: out = softmax(q kᵀ / sqrt(D)) v.

Queries are taken in runs whose scores fill `SCORES_BYTES`, so memory grows with the tokens, not with their square.
Scores and softmax are fp32; what multiplies v is rounded to the inputs' dtype before it is divided by its sum, as in
fused attention.
"""

import torch

from .arguments import FLOATS, described
from .registry import Registry, Request, lazily, no_refusal, triton_refusal

WIDE_ATTENTION = Registry("wide_attention")
WIDENS = "dtype" in torch.ops.aten.mm.overloads()  # whether torch multiplies 16-bit matrices into fp32
SCORES_BYTES = 64 * 2**20  # of a run of queries, in fp32; half as much again for what multiplies v


def wide_attention(q, k, v, backend="auto"):
    """out = softmax(q kᵀ / sqrt(D)) v for q [B, S, D] and k, v [B, T, D], contiguous, of one floating dtype.

    Returns out [B, S, D] contiguous. Raises ValueError on other shapes, dtypes or layouts.
    """
    fits = q.ndim == k.ndim == 3 and v.shape == k.shape and (q.shape[0], q.shape[2]) == (k.shape[0], k.shape[2])
    alike = q.dtype == k.dtype == v.dtype and q.dtype in FLOATS and q.device == k.device == v.device
    if not fits or not alike or not all(tensor.is_contiguous() for tensor in (q, k, v)):
        given = "; ".join(described(tensor) for tensor in (q, k, v))
        raise ValueError(
            f"q, k, v: expected contiguous [B, S, D], [B, T, D], [B, T, D] of one floating dtype on one device, "
            f"got {given}"
        )
    return WIDE_ATTENTION.choose(backend, Request(q.device)).function(q, k, v)


def wide_attention_reference(q, k, v):
    return in_runs(q, k, v, _weights)


def _weights(scores, dtype, factor):
    """(exp(factor * (scores - their largest)) in dtype, its sums [S, 1] in fp32) of scores [S, T]"""
    shifted = (scores - scores.amax(1, keepdim=True)).mul_(factor).exp_()
    return shifted.to(dtype), shifted.sum(1, keepdim=True)


def in_runs(q, k, v, weights):
    """wide_attention of q, k, v run by run; weights(scores [S, T] fp32, dtype, factor) as `_weights` gives them."""
    batch, queries, width = q.shape
    run = max(SCORES_BYTES // (4 * k.shape[1]), 1)
    out = torch.empty_like(q)
    for image in range(batch):
        for first in range(0, queries, run):
            rows = slice(first, first + run)
            scores = _product(q[image, rows], k[image].T)
            numerators, sums = weights(scores, q.dtype, width**-0.5)
            torch.div(_product(numerators, v[image]), sums, out=out[image, rows])
    return out


def _product(a, b):
    """a b in fp32, of 16-bit factors too."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda and WIDENS:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _triton_refusal(request):
    if not WIDENS:
        return f"torch {torch.__version__} multiplies 16-bit matrices into 16 bit only"
    return triton_refusal(request)


WIDE_ATTENTION.register("triton", lazily("wide_attention_triton", "wide_attention"), _triton_refusal)
WIDE_ATTENTION.register("torch", wide_attention_reference, no_refusal)
