"""Normalisation of rows with what stands around it in a block: modulation, gate, residual sum, FP8 quantisation.

Rows are the last dimension of [B, S, D] tensors; every row is read once and written once. All arithmetic is fp32,
whatever the dtypes; each argument may have a floating dtype of its own.
"""

import torch

from .arguments import FP8, check_per_image, check_power_of_two, check_rows, outputs, write
from .registry import Registry, Request, lazily, no_refusal, triton_refusal

RMS_MODULATE = Registry("rms_modulate")
RESIDUAL_RMS_MODULATE = Registry("residual_rms_modulate")
RESIDUAL_RMS_MODULATE_OF_SUMS = Registry("residual_rms_modulate_of_sums")
ADD_RMS = Registry("add_rms")
LAYER_MODULATE = Registry("layer_modulate")


def rms_modulate(x, weight, scale, eps, quantise=False, dtype=None, out=None, backend="auto"):
    """y = x / sqrt(mean(x², -1) + eps) * weight * (1 + scale)

    x [B, S, D] contiguous, weight [D], scale [B, D] or None (then no modulation). Returns y [B, S, D] in `dtype`
    (default: x's). With `quantise`: (FP8 codes [B, S, D], row scales fp32 [B*S, 1]) with y = codes * scale and
    scale = absmax of the row / 448. `out`: what is returned, to be written into. Raises ValueError on other shapes,
    dtypes or layouts.
    """
    check_rows(x, "x")
    check_rows(weight, "weight", x.shape[2:], like=x)
    check_per_image(scale, "scale", x)
    y, row_scales = outputs(x.shape, FP8 if quantise else dtype or x.dtype, x.device, out)
    chosen = RMS_MODULATE.choose(backend, Request(x.device, quantise))
    chosen.function(x, weight, scale, eps, y, row_scales)
    return (y, row_scales) if quantise else y


def rms_modulate_reference(x, weight, scale, eps, y, row_scales):
    write(_modulated(_rms_norm(x.float(), eps) * weight.float(), scale), y, row_scales)


def residual_rms_modulate(
    x,
    h,
    post_weight,
    gate,
    next_weight,
    scale,
    eps,
    quantise=False,
    h_scale=1.0,
    h_row_scales=None,
    h_column_scales=None,
    dtype=None,
    x_out=None,
    out=None,
    backend="auto",
):
    """x' = x + tanh(gate) * RMSNorm(h / h_scale) * post_weight;  y = RMSNorm(x') * next_weight * (1 + scale)

    The end of one half of a block and the beginning of the next, for which the forward asks `residual.add` where it has
    no FP8 rows and no fp16. x [B, S, D] is the residual stream, h [B, S, D] what the half computed, both contiguous;
    post_weight, next_weight [D]; gate, scale [B, D] or None (no gate: factor 1; no scale: 0). Returns (x', y) with x'
    in x's dtype and y, computed from x' as rounded, in `dtype` (default: h's); with `quantise` (x', FP8 y, row scales);
    with next_weight None (the last block) x' alone. `x_out` (may be x itself) and `out` (y, or (FP8 y, row scales)) are
    written into.

    FP8: h may be the bare sums of `fp8.product`, with h_row_scales fp32 [B*S, 1] and h_column_scales fp32 [D], both or
    neither: then h * h_row_scales * h_column_scales stands in h's place. A user's own backend registers for that as
    RESIDUAL_RMS_MODULATE_OF_SUMS, whose functions take the two after the others.

    fp16: upstream may hold h times a power of two, `h_scale` = 2^-k, to stay below 65504. The norm undoes it exactly:
    h / h_scale / sqrt(mean((h / h_scale)²) + eps) = h / sqrt(mean(h²) + eps * h_scale²), and a power of two changes
    exponents only. Raises ValueError on an h_scale that is none, and on other shapes, dtypes or layouts.
    """
    check_rows(x, "x")
    check_rows(h, "h", x.shape, like=x)
    check_rows(post_weight, "post_weight", x.shape[2:], like=x)
    check_per_image(gate, "gate", x)
    check_power_of_two(h_scale, "h_scale")
    if (h_row_scales is None) != (h_column_scales is None):
        raise ValueError("h_row_scales, h_column_scales: expected both or neither, got one of them")
    op, h_scales = RESIDUAL_RMS_MODULATE, ()
    if h_row_scales is not None:
        check_rows(h_row_scales, "h_row_scales", (x.shape[:2].numel(), 1), like=x, dtypes=(torch.float32,))
        check_rows(h_column_scales, "h_column_scales", x.shape[2:], like=x, dtypes=(torch.float32,))
        op, h_scales = RESIDUAL_RMS_MODULATE_OF_SUMS, (h_row_scales, h_column_scales)
    x_out = torch.empty_like(x) if x_out is None else check_rows(x_out, "x_out", x.shape, like=x, dtypes=(x.dtype,))
    y = row_scales = None
    if next_weight is not None:
        check_rows(next_weight, "next_weight", x.shape[2:], like=x)
        check_per_image(scale, "scale", x)
        y, row_scales = outputs(x.shape, FP8 if quantise else dtype or h.dtype, x.device, out)
    elif scale is not None or quantise or out is not None:
        raise ValueError("scale, quantise and out belong to the next norm: expected none of them without next_weight")
    chosen = op.choose(backend, Request(x.device, quantise))
    chosen.function(x, h, post_weight, gate, next_weight, scale, eps, h_scale, x_out, y, row_scales, *h_scales)
    if next_weight is None:
        return x_out
    return (x_out, y, row_scales) if quantise else (x_out, y)


def residual_rms_modulate_reference(x, h, post_weight, gate, next_weight, scale, eps, h_scale, x_out, y, row_scales):
    branch = _rms_norm(h.float(), eps * h_scale**2) * post_weight.float()
    if gate is not None:
        branch = branch * gate.float().tanh()[:, None]
    x_out.copy_(x.float() + branch)
    if next_weight is not None:
        rms_modulate_reference(x_out, next_weight, scale, eps, y, row_scales)


def residual_rms_modulate_of_sums_reference(x, h, *others):
    *others, h_row_scales, h_column_scales = others
    h = h.float() * h_column_scales * h_row_scales.view(*h.shape[:2], 1)
    residual_rms_modulate_reference(x, h, *others)


def add_rms(x, h, weight, eps, x_out=None, out=None, backend="auto"):
    """x' = x + h;  y = x' / sqrt(mean(x'², -1) + eps) * weight

    The end of one half of a language model's block, which has no norm behind it, and the norm of the next half. x
    [B, S, D] is the residual stream, h [B, S, D] what the half computed, both contiguous; weight [D]. Returns (x', y)
    with x' in x's dtype and y, computed from x' as rounded, in h's. `x_out` (may be x itself) and `out` are written
    into. Raises ValueError on other shapes, dtypes or layouts.
    """
    check_rows(x, "x")
    check_rows(h, "h", x.shape, like=x)
    check_rows(weight, "weight", x.shape[2:], like=x)
    x_out = torch.empty_like(x) if x_out is None else check_rows(x_out, "x_out", x.shape, like=x, dtypes=(x.dtype,))
    y, _ = outputs(x.shape, h.dtype, x.device, out)
    ADD_RMS.choose(backend, Request(x.device)).function(x, h, weight, eps, x_out, y)
    return x_out, y


def add_rms_reference(x, h, weight, eps, x_out, y):
    x_out.copy_(x.float() + h.float())
    rms_modulate_reference(x_out, weight, None, eps, y, None)


def layer_modulate(x, scale, eps, dtype=None, out=None, backend="auto"):
    """y = (x - mean(x, -1)) / sqrt(var(x, -1) + eps) * (1 + scale)

    The final layer: LayerNorm without affine, var with divisor D. x [B, S, D] contiguous, scale [B, D] or None.
    Returns y [B, S, D] in `dtype` (default: x's), in `out` if given. Raises ValueError as `rms_modulate` does.
    """
    check_rows(x, "x")
    check_per_image(scale, "scale", x)
    y, _ = outputs(x.shape, dtype or x.dtype, x.device, out)
    LAYER_MODULATE.choose(backend, Request(x.device)).function(x, scale, eps, y)
    return y


def layer_modulate_reference(x, scale, eps, y):
    x = x.float()
    write(_modulated(_rms_norm(x - x.mean(-1, keepdim=True), eps), scale), y, None)


def _rms_norm(x, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _modulated(y, scale):
    return y if scale is None else y * (1 + scale.float()[:, None])


RMS_MODULATE.register("triton", lazily("norm_triton", "rms_modulate"), triton_refusal)
RMS_MODULATE.register("torch", rms_modulate_reference, no_refusal)
RESIDUAL_RMS_MODULATE.register("triton", lazily("norm_triton", "residual_rms_modulate"), triton_refusal)
RESIDUAL_RMS_MODULATE.register("torch", residual_rms_modulate_reference, no_refusal)
RESIDUAL_RMS_MODULATE_OF_SUMS.register("triton", lazily("norm_triton", "residual_rms_modulate"), triton_refusal)
RESIDUAL_RMS_MODULATE_OF_SUMS.register("torch", residual_rms_modulate_of_sums_reference, no_refusal)
ADD_RMS.register("triton", lazily("norm_triton", "add_rms"), triton_refusal)
ADD_RMS.register("torch", add_rms_reference, no_refusal)
LAYER_MODULATE.register("triton", lazily("norm_triton", "layer_modulate"), triton_refusal)
LAYER_MODULATE.register("torch", layer_modulate_reference, no_refusal)
