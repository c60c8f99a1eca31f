"""A residual stream that is held as its norm: what the next linear takes, and nothing beside it.

Every half of a block reads the stream, adds to it, writes it, and writes its norm. The norm alone tells both: a row of
the stream is the row of its norm times the row's root mean square, over what each column was multiplied by. So a pass
over memory in four is spared. The norm, not the stream, is then rounded, by as many bits of each number.
"""

from typing import NamedTuple

import torch

from .arguments import check_per_image, check_rows, described
from .registry import Registry, Request, lazily, no_refusal, triton_refusal

SMALLEST = 2.0**-40  # what a column is multiplied by at least, else zeros there would forget the stream
RESIDUAL_ADD = Registry("residual_add")


class Normed(NamedTuple):
    """x [B, S, D] = y * rms / (weight * (1 + scale)).

    y [B, S, D] is its norm, rms fp32 [B*S, 1] what rows were divided by; weight [D] and scale [B, D] or None.
    """

    y: torch.Tensor
    rms: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor | None


def add(x, h, post_weight, gate, next_weight, scale, eps, out=None, backend="auto"):
    """x' = x + tanh(gate) * RMSNorm(h) * post_weight, as Normed: y = RMSNorm(x') * next_weight * (1 + scale)

    As `norm.residual_rms_modulate`, but that y is computed from x' before any rounding. x is a tensor [B, S, D] or
    Normed, in bf16 or fp32 (fp16 would lose what lies below its range), and y has its dtype; h [B, S, D], post_weight,
    next_weight [D]; gate, scale [B, D] or None. A column whose next_weight * (1 + scale) is below 2^-40 is multiplied
    by that. With next_weight None (the last block) the result is x' [B, S, D] itself. `out`, which may be x or its y,
    is written into. Raises ValueError on other shapes, dtypes or layouts.
    """
    held = x if isinstance(x, Normed) else Normed(x, None, None, None)
    check_rows(held.y, "x", dtypes=(torch.bfloat16, torch.float32))
    check_rows(h, "h", held.y.shape, like=held.y)
    columns, rows = h.shape[2:], (h.shape[:2].numel(), 1)
    check_rows(post_weight, "post_weight", columns, like=h)
    check_per_image(gate, "gate", h)
    if held.rms is not None:
        check_rows(held.rms, "x.rms", rows, like=h, dtypes=(torch.float32,))
        check_rows(held.weight, "x.weight", columns, like=h)
        check_per_image(held.scale, "x.scale", h)
    y = torch.empty_like(held.y) if out is None else check_rows(out, "out", h.shape, like=h, dtypes=(held.y.dtype,))
    rms = None
    if next_weight is not None:
        check_rows(next_weight, "next_weight", columns, like=h)
        check_per_image(scale, "scale", h)
        rms = torch.empty(rows, dtype=torch.float32, device=h.device)
    elif scale is not None:
        raise ValueError(f"scale: belongs to the next norm, expected None without next_weight, got {described(scale)}")
    chosen = RESIDUAL_ADD.choose(backend, Request(h.device))
    chosen.function(held, h, post_weight, gate, next_weight, scale, eps, y, rms)
    return y if next_weight is None else Normed(y, rms, next_weight, scale)


def add_reference(x, h, post_weight, gate, next_weight, scale, eps, y, rms):
    total = x.y.float()
    if x.rms is not None:
        total = total * x.rms.view(*h.shape[:2], 1) / _gain(x.weight, x.scale)
    branch = h.float() * _inverse_rms(h.float(), eps) * post_weight.float()
    total = total + (branch if gate is None else branch * gate.float().tanh()[:, None])
    if next_weight is None:
        y.copy_(total)
        return
    inverse = _inverse_rms(total, eps)
    rms.copy_(1 / inverse.view(-1, 1))
    y.copy_(total * inverse * _gain(next_weight, scale))


def _inverse_rms(x, eps):
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _gain(weight, scale):
    gain = weight.float() if scale is None else weight.float() * (1 + scale.float()[:, None])
    return torch.where(gain.abs() < SMALLEST, SMALLEST, gain)


RESIDUAL_ADD.register("triton", lazily("residual_triton", "add"), triton_refusal)
RESIDUAL_ADD.register("torch", add_reference, no_refusal)
