"""Attention's formula, and what the codes of FP8 attention stand for."""

import torch

from zimage_turbo.kernels import heads


def formula(q, k, v, lengths=None):
    """softmax(q kᵀ / sqrt(D)) v with every step in the tensors' dtype."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if lengths is not None:
        attended = torch.arange(k.shape[2], device=k.device) < lengths[:, None]
        scores = scores.masked_fill(~attended[:, None, None], float("-inf"))
    return scores.softmax(-1) @ v


def exactly(q, k, v, lengths=None):
    """The formula in float64, head by head to bound its memory."""
    parts = [formula(*(part[:, [head]].double() for part in (q, k, v)), lengths) for head in range(q.shape[1])]
    return torch.cat(parts, 1)


def decoded(codes, scales):
    """Codes [B, H, S, D] times the scales of their blocks, in float64."""
    return codes.double() * _by_token(scales, codes.shape[2])


def decoded_values(codes, scales, tokens):
    """The same of transposed codes, as [B, H, S, D]."""
    places = torch.argsort(heads.TOKEN_ORDER).to(codes.device)
    values = codes.double().unflatten(3, (-1, 32))[..., places].flatten(3).transpose(2, 3)
    return values[:, :, :tokens] * _by_token(scales, tokens)


def _by_token(scales, tokens):
    return scales.double().repeat_interleave(heads.BLOCK, 2)[:, :, :tokens, None]
