"""Pictures in channels_last memory: [B, C, H, W] whose values lie as [B, H, W, C], so that a pixel is a row."""

import torch

from .arguments import FLOATS, described

FLOAT_NAMES = "bfloat16/float16/float32"


def check_picture(tensor, name, shape=None, like=None):
    """The tensor, if it is a channels_last [B, C, H, W] of a float type; of that shape, and as `like` is, if given."""
    fits = tensor.ndim == 4 if shape is None else tensor.shape == shape
    alike = tensor.dtype in FLOATS if like is None else (tensor.dtype, tensor.device) == (like.dtype, like.device)
    if not fits or not alike or not tensor.is_contiguous(memory_format=torch.channels_last):
        expected = "[B, C, H, W]" if shape is None else str(list(shape))
        kind = FLOAT_NAMES if like is None else f"{like.dtype} on {like.device}"
        raise ValueError(
            f"{name}: expected a channels_last {expected} of {kind}, got {described(tensor)}; "
            f"pass {name}.contiguous(memory_format=torch.channels_last) or convert it"
        )
    return tensor


def check_per_channel(tensor, name, x):
    """None, or a contiguous tensor [C] of a float type for x [B, C, H, W]."""
    if tensor is None:
        return
    fits = tensor.shape == x.shape[1:2] and tensor.is_contiguous()
    if not fits or tensor.dtype not in FLOATS or tensor.device != x.device:
        raise ValueError(
            f"{name}: expected a contiguous [{x.shape[1]}] of {FLOAT_NAMES} on {x.device}, got {described(tensor)}"
        )


def picture(shape, like, name, out):
    """`out`, checked, or a new channels_last picture of that shape, of `like`'s dtype and device."""
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    return check_picture(out, name, shape, like)


def summed(x, h, shift):
    """x + h + shift in fp32; h [B, C, H, W] and shift [C] may be None."""
    total = x.float()
    if h is not None:
        total = total + h.float()
    return total if shift is None else total + shift.float()[:, None, None]
