"""Nearest upsampling of channels_last pictures to twice the size, with the residual sum that precedes it in a VAE."""

from torch.nn.functional import interpolate

from .channels_last import check_per_channel, check_picture, picture, summed
from .registry import Registry, Request, lazily, no_refusal, triton_refusal

UPSAMPLE = Registry("upsample")


def upsample(x, h=None, shift=None, out=None, backend="auto"):
    """y[:, :, i, j] = x[:, :, i // 2, j // 2] + h[:, :, i // 2, j // 2] + shift

    x, h [B, C, H, W] channels_last of one dtype, shift [C]; h and shift may be None (zero). Returns y [B, C, 2H, 2W]
    channels_last in x's dtype, in `out` if given. Raises ValueError on other shapes, dtypes or layouts.
    """
    check_picture(x, "x")
    if h is not None:
        check_picture(h, "h", x.shape, x)
    check_per_channel(shift, "shift", x)
    batch, channels, height, width = x.shape
    y = picture((batch, channels, 2 * height, 2 * width), x, "out", out)
    UPSAMPLE.choose(backend, Request(x.device)).function(x, h, shift, y)
    return y


def upsample_reference(x, h, shift, y):
    y.copy_(interpolate(summed(x, h, shift), scale_factor=2, mode="nearest"))


UPSAMPLE.register("triton", lazily("upsample_triton", "upsample"), triton_refusal)
UPSAMPLE.register("torch", upsample_reference, no_refusal)
