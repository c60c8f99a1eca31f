"""What the element-wise ops share: checks of their arguments before a launch, outputs, and FP8 rows."""

import math

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_rows(tensor, name, shape=None, like=None, dtypes=FLOATS):
    """The tensor, if it is contiguous, of that shape (None: any [B, S, D]), of such a dtype, on `like`'s device."""
    device = tensor.device if like is None else like.device
    fits = tensor.ndim == 3 if shape is None else tensor.shape == shape
    if not fits or tensor.dtype not in dtypes or tensor.device != device or not tensor.is_contiguous():
        expected = "[B, S, D]" if shape is None else str(list(shape))
        raise ValueError(
            f"{name}: expected a contiguous {expected} of {_names(dtypes)} on {device}, "
            f"got {described(tensor)}; pass {name}.contiguous() or convert it"
        )
    return tensor


def check_tensor(op, name, tensor, shape, dtype, device):
    """Raises ValueError, beginning with `op`, unless the tensor is a contiguous one of that shape and dtype there."""
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device != device:
        raise ValueError(
            f"{op}: expected {name} to be a contiguous {list(shape)} of {dtype} on {device}, got {described(tensor)}"
        )


def check_per_image(tensor, name, x):
    """None, or a tensor [B, D] (rows may lie apart, as chunks of a wider one do) for x [B, S, D]."""
    if tensor is None:
        return
    shape = (x.shape[0], x.shape[-1])
    fits = tensor.shape == shape and tensor.stride(-1) == 1
    if not fits or tensor.dtype not in FLOATS or tensor.device != x.device:
        raise ValueError(
            f"{name}: expected {list(shape)} of {_names(FLOATS)} on {x.device} with unit stride in its rows, "
            f"got {described(tensor)}"
        )


def check_power_of_two(value, name):
    if not value > 0 or math.frexp(value)[0] != 0.5:
        raise ValueError(f"{name}: expected a power of two, which scales without rounding, got {value}")


def outputs(shape, dtype, device, out):
    """(y, row scales): y of that shape and dtype with row scales [rows, 1] for FP8, else None; `out` if given."""
    quantise = dtype == FP8
    if not quantise and dtype not in FLOATS:
        raise ValueError(f"dtype: expected one of {_names(FLOATS)}, got {dtype}")
    rows = (math.prod(shape[:-1]), 1)
    if out is None:
        y = torch.empty(shape, dtype=dtype, device=device)
        return y, torch.empty(rows, dtype=torch.float32, device=device) if quantise else None
    if quantise and not isinstance(out, tuple):
        raise ValueError("out: expected a pair of tensors, FP8 codes and row scales, with quantise")
    y, row_scales = out if quantise else (out, None)
    place = torch.empty(0, device=device)
    check_rows(y, "out", shape, like=place, dtypes=(dtype,))
    if quantise:
        check_rows(row_scales, "out row scales", rows, like=place, dtypes=(torch.float32,))
    return y, row_scales


def described(tensor) -> str:
    """Shape, strides, dtype and device of a tensor, for an error."""
    return f"{list(tensor.shape)} of {_names([tensor.dtype])}, strides {list(tensor.stride())}, on {tensor.device}"


def quantise_rows(y):
    """FP8 e4m3fn codes of y [..., D] and row scales [rows, 1] fp32: y = codes * scale, scale = absmax / 448.

    A row of zeros has the scale of an absmax of 1e-12.
    """
    row_scales = y.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    codes = (y.float() / row_scales).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return codes, row_scales.reshape(-1, 1)


def write(values, y, row_scales):
    """What a reference computed, rounded into y; or quantised into y and row_scales."""
    if row_scales is None:
        y.copy_(values)
        return
    codes, scales = quantise_rows(values)
    y.copy_(codes)
    row_scales.copy_(scales)


def _names(dtypes) -> str:
    return "/".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
