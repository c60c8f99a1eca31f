"""GroupNorm of channels_last pictures with what stands around it in a VAE: a convolution's bias, SiLU, residual sum.

Statistics and arithmetic are fp32, whatever the dtypes; the means and squared deviations of blocks of pixels are
merged, so a mean far from zero costs no digits, and in a fixed order, so a result is the same every time.
"""

import torch

from .channels_last import check_per_channel, check_picture, picture, summed
from .registry import Registry, Request, lazily, no_refusal, triton_refusal

GROUP_NORM = Registry("group_norm")
RESIDUAL_GROUP_NORM = Registry("residual_group_norm")


def group_norm(x, groups, weight, bias, eps, silu=False, shift=None, out=None, backend="auto"):
    """y = act((x' - mean(x')) / sqrt(var(x') + eps) * weight + bias) with x' = x + shift

    x [B, C, H, W] channels_last; mean and var (divisor: their number) over the pixels and C / groups channels of each
    group; weight, bias [C]; shift [C] or None (zero); act is SiLU or nothing. Returns y [B, C, H, W] channels_last in
    x's dtype, in `out` if given, which may be x. Raises ValueError on other shapes, dtypes or layouts.
    """
    _check(x, groups, weight, bias, shift)
    y = picture(x.shape, x, "out", out)
    chosen = GROUP_NORM.choose(backend, Request(x.device))
    chosen.function(x, groups, weight, bias, eps, silu, shift, y)
    return y


def group_norm_reference(x, groups, weight, bias, eps, silu, shift, y):
    _normalise(summed(x, None, shift), groups, weight, bias, eps, silu, y)


def residual_group_norm(x, h, groups, weight, bias, eps, silu=False, shift=None, x_out=None, out=None, backend="auto"):
    """x' = x + h + shift;  y = act((x' - mean(x')) / sqrt(var(x') + eps) * weight + bias)

    The end of one block and the beginning of the next. x and h [B, C, H, W] channels_last of one dtype, the others as
    `group_norm` has them. Returns (x', y) with y computed from x' as rounded, in `x_out` and `out` if given: one of
    them may be x and the other h. Raises ValueError as `group_norm` does.
    """
    _check(x, groups, weight, bias, shift)
    check_picture(h, "h", x.shape, x)
    x_out = picture(x.shape, x, "x_out", x_out)
    y = picture(x.shape, x, "out", out)
    chosen = RESIDUAL_GROUP_NORM.choose(backend, Request(x.device))
    chosen.function(x, h, groups, weight, bias, eps, silu, shift, x_out, y)
    return x_out, y


def residual_group_norm_reference(x, h, groups, weight, bias, eps, silu, shift, x_out, y):
    x_out.copy_(summed(x, h, shift))
    _normalise(x_out.float(), groups, weight, bias, eps, silu, y)


def _normalise(x, groups, weight, bias, eps, silu, y):
    grouped = x.unflatten(1, (groups, -1))
    var, mean = torch.var_mean(grouped, (2, 3, 4), correction=0, keepdim=True)
    normal = ((grouped - mean) * torch.rsqrt(var + eps)).flatten(1, 2)
    affine = normal * weight.float()[:, None, None] + bias.float()[:, None, None]
    y.copy_(torch.nn.functional.silu(affine) if silu else affine)


def _check(x, groups, weight, bias, shift):
    check_picture(x, "x")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: expected a divisor of the {x.shape[1]} channels of x, got {groups}")
    for value, name in ((weight, "weight"), (bias, "bias"), (shift, "shift")):
        check_per_channel(value, name, x)


GROUP_NORM.register("triton", lazily("group_norm_triton", "group_norm"), triton_refusal)
GROUP_NORM.register("torch", group_norm_reference, no_refusal)
RESIDUAL_GROUP_NORM.register("triton", lazily("group_norm_triton", "residual_group_norm"), triton_refusal)
RESIDUAL_GROUP_NORM.register("torch", residual_group_norm_reference, no_refusal)
