"""RMSNorm of queries and keys per head, then rotation of channel pairs half a head apart, as language models turn them.

`rope` is the form for neighbouring channels. All arithmetic is fp32 and rounds once, at the end.
"""

import torch

from .arguments import FLOATS, check_rows, described
from .registry import Registry, Request, lazily, no_refusal, triton_refusal

QK_NORM_ROPE_HALF = Registry("qk_norm_rope_half")


def qk_norm_rope_half(q, k, q_weight, k_weight, table, eps, out=None, backend="auto"):
    """q' = rotate(RMSNorm(q) * q_weight), k' = rotate(RMSNorm(k) * k_weight)

    rotate: (a, b) of channels (i, i + D/2) becomes (a cos - b sin, a sin + b cos), with (cos, sin) of the token and i.

    q [B, S, H, D] and k [B, S, G, D] of one dtype with any strides but a last of 1, D even; q_weight, k_weight [D];
    table [S, D/2, 2] of (cos, sin), fp32, contiguous. Returns q', k' of the same shapes and dtype, contiguous. `out`:
    (q', k') to be written into; q and k themselves are allowed. Raises ValueError otherwise.
    """
    _check(q, "q", q)
    _check(k, "k", q)
    width = q.shape[-1]
    check_rows(q_weight, "q_weight", (width,), like=q)
    check_rows(k_weight, "k_weight", (width,), like=q)
    check_rows(table, "table", (q.shape[1], width // 2, 2), like=q, dtypes=(torch.float32,))
    if out is None:
        out = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    for name, tensor, x in zip(("out q", "out k"), out, (q, k), strict=True):
        check_rows(tensor, name, x.shape, like=x, dtypes=(x.dtype,))
    QK_NORM_ROPE_HALF.choose(backend, Request(q.device)).function(q, k, q_weight, k_weight, table, eps, out)
    return out


def qk_norm_rope_half_reference(q, k, q_weight, k_weight, table, eps, out):
    cos, sin = table[:, None].unbind(-1)
    for x, weight, turned in zip((q, k), (q_weight, k_weight), out, strict=True):
        x = x.float()
        a, b = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()).chunk(2, -1)
        turned.copy_(torch.cat((a * cos - b * sin, a * sin + b * cos), -1))


def _check(x, name, q):
    fits = x.ndim == 4 and (*x.shape[:2], x.shape[3]) == (*q.shape[:2], q.shape[3]) and x.shape[-1] % 2 == 0
    if not fits or x.dtype not in FLOATS or x.dtype != q.dtype or x.device != q.device or x.stride(-1) != 1:
        expected = "[B, S, H, D] of floats with an even D" if x is q else f"heads as q, {described(q)}, has them"
        raise ValueError(f"{name}: expected {expected} and a last stride of 1, got {described(x)}")


QK_NORM_ROPE_HALF.register("triton", lazily("rope_half_triton", "qk_norm_rope_half"), triton_refusal)
QK_NORM_ROPE_HALF.register("torch", qk_norm_rope_half_reference, no_refusal)
