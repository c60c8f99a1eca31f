"""The gate of the feed-forward layer: SiLU of one projection times the other, with FP8 quantisation of the rows."""

import torch

from .arguments import FLOATS, FP8, check_power_of_two, described, outputs, write
from .registry import Registry, Request, lazily, no_refusal, triton_refusal

SILU_MUL = Registry("silu_mul")


def silu_mul(a, b, quantise=False, factor=1.0, dtype=None, out=None, backend="auto"):
    """y = silu(a) * b * factor, with silu(a) = a / (1 + exp(-a))

    a, b [M, F] with unit stride in their rows. Computed in fp32, returned as [M, F] in `dtype` (default: a's). With
    `quantise`: (FP8 codes [M, F], row scales fp32 [M, 1]), y = codes * scale, scale = absmax of the row / 448. `out`:
    what is returned, to be written into (contiguous).

    `factor`, a power of two, keeps an fp16 result below 65504: the next linear's output is then scaled by it too,
    exactly, and the RMSNorm behind that undoes it (`h_scale` of norm.residual_rms_modulate). Raises ValueError on
    another factor, and on other shapes, dtypes or layouts.
    """
    _check(a, "a", a)
    _check(b, "b", a)
    check_power_of_two(factor, "factor")
    y, row_scales = outputs(a.shape, FP8 if quantise else dtype or a.dtype, a.device, out)
    SILU_MUL.choose(backend, Request(a.device, quantise)).function(a, b, factor, y, row_scales)
    return (y, row_scales) if quantise else y


def silu_mul_reference(a, b, factor, y, row_scales):
    write(torch.nn.functional.silu(a.float()) * b.float() * factor, y, row_scales)


def _check(tensor, name, a):
    fits = tensor.ndim == 2 and tensor.shape == a.shape and tensor.stride(1) == 1
    if not fits or tensor.dtype not in FLOATS or tensor.device != a.device:
        expected = "[M, F]" if tensor is a else str(list(a.shape))
        raise ValueError(
            f"{name}: expected {expected} of floats on {a.device} with unit stride in its rows, got {described(tensor)}"
        )


SILU_MUL.register("triton", lazily("swiglu_triton", "silu_mul"), triton_refusal)
SILU_MUL.register("torch", silu_mul_reference, no_refusal)
