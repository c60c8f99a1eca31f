"""RMSNorm of queries and keys per head, then rotation of neighbouring channels, from the joint projection's output.

All arithmetic is fp32 and rounds once, at the end.
"""

import torch

from .arguments import FLOATS, FP8, FP8_MAX, check_rows, described
from .heads import BLOCK
from .registry import Registry, Request, lazily, no_refusal, triton_refusal

QK_NORM_ROPE = Registry("qk_norm_rope")


def angles(rotations):
    """The table that `qk_norm_rope` reads, from rotation matrices as the host's EmbedND gives them.

    rotations [B, S, 1, D/2, 2, 2] or [B, 1, S, D/2, 2, 2], [[cos, -sin], [sin, cos]] for each token and pair. Returns
    fp32 [B, S, D/2, 2] of (cos, sin).
    """
    return rotations[..., 0].float().reshape(rotations.shape[0], -1, *rotations.shape[-3:-1]).contiguous()


def qk_norm_rope(qkv, q_weight, k_weight, table, eps, layout="heads", quantise=False, out=None, backend="auto"):
    """q = rotate(RMSNorm(qkv[:, :, 0]) * q_weight), k likewise from 1 with k_weight, v = qkv[:, :, 2]

    rotate: (a, b) of channels (2i, 2i + 1) becomes (a cos - b sin, a sin + b cos), with (cos, sin) of the token and i.

    qkv [B, S, 3, H, D] contiguous (the joint linear's output, viewed), D even; q_weight, k_weight [D]; table
    [S, D/2, 2] or [B, S, D/2, 2] of (cos, sin), fp32, contiguous. Returns q, k, v of shape [B, H, S, D] in qkv's
    dtype. `layout` says how q and k lie in memory: "heads" is [B, H, S, D], "tokens" is [B, S, H, D]; v is a view of
    qkv. With `quantise`, q and k are pairs of FP8 codes and scales as `heads` describes them; their scale is that of
    the bound sqrt(D) max |weight|, which no normed and rotated value exceeds. `out`: q and k (their codes) of that
    shape, with any strides but a last of 1, to be written into; views of qkv itself are allowed. Raises ValueError
    otherwise.
    """
    _check(qkv, q_weight, k_weight, table)
    batch, tokens, _, heads, width = qkv.shape
    dtype = FP8 if quantise else qkv.dtype
    if out is None:
        if layout not in ("heads", "tokens"):
            raise ValueError(f'layout: expected "heads" or "tokens", got {layout!r}')
        order = (batch, heads, tokens, width) if layout == "heads" else (batch, tokens, heads, width)
        out = torch.empty((2, *order), dtype=dtype, device=qkv.device)
        out = tuple(out if layout == "heads" else out.transpose(2, 3))
    _check_out(out, qkv, dtype)
    scales = torch.empty(2, dtype=torch.float32, device=qkv.device) if quantise else None
    chosen = QK_NORM_ROPE.choose(backend, Request(qkv.device, quantise))
    chosen.function(qkv, q_weight, k_weight, table, eps, out, scales)
    if quantise:
        scales = scales[:, None, None, None].expand(2, batch, heads, -(-tokens // BLOCK))
        out = tuple(zip(out, scales, strict=True))
    return (*out, qkv[:, :, 2].transpose(1, 2))


def qk_norm_rope_reference(qkv, q_weight, k_weight, table, eps, out, scales):
    for part, weight in enumerate((q_weight, k_weight)):
        rotated = normed_and_turned(qkv[:, :, part], weight, table, eps)
        if scales is not None:
            scales[part] = weight.float().abs().amax().clamp(min=1e-12) * len(weight) ** 0.5 / FP8_MAX
            rotated = (rotated / scales[part]).clamp(-FP8_MAX, FP8_MAX)
        out[part].copy_(rotated.transpose(1, 2))


def normed_and_turned(x, weight, table, eps):
    """rotate(RMSNorm(x) * weight) of x [B, S, H, D], in fp32."""
    cos, sin = table[..., None, :, :].unbind(-1)
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def _check(qkv, q_weight, k_weight, table):
    fits = qkv.ndim == 5 and qkv.shape[2] == 3 and qkv.shape[4] % 2 == 0
    if not fits or qkv.dtype not in FLOATS or not qkv.is_contiguous():
        raise ValueError(f"qkv: expected a contiguous [B, S, 3, H, D] of floats with an even D, got {described(qkv)}")
    check_rows(q_weight, "q_weight", qkv.shape[4:], like=qkv)
    check_rows(k_weight, "k_weight", qkv.shape[4:], like=qkv)
    check_table(table, qkv)


def check_table(table, x):
    """Raises ValueError unless `table` has (cos, sin) for the tokens of x [B, S, n, H, D], or for each image's."""
    batch, tokens, _, _, width = x.shape
    one = (tokens, width // 2, 2)
    check_rows(table, "table", one if table.ndim == 3 else (batch, *one), like=x, dtypes=(torch.float32,))


def _check_out(out, qkv, dtype):
    batch, tokens, _, heads, width = qkv.shape
    shape = (batch, heads, tokens, width)
    for tensor in out:
        same = tensor.shape == shape and tensor.dtype == dtype and tensor.device == qkv.device
        if not same or tensor.stride(-1) != 1:
            raise ValueError(f"out: expected {list(shape)} of {dtype} on {qkv.device}, got {described(tensor)}")
    if len(out) != 2:
        raise ValueError(f"out: expected 2 tensors (q, k), got {len(out)}")


QK_NORM_ROPE.register("triton", lazily("rope_triton", "qk_norm_rope"), triton_refusal)
QK_NORM_ROPE.register("torch", qk_norm_rope_reference, no_refusal)
