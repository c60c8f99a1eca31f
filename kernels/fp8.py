"""FP8 (e4m3fn) with one scale a row: quantising activations and weights, and their product on FP8 tensor cores."""

import torch

from . import arguments
from .arguments import FLOATS, FP8, described

CAPABILITY = (8, 9)


def supported(device: torch.device | str) -> str | None:
    """None if the device multiplies FP8, else the reason why not."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"FP8 products need an NVIDIA GPU of compute capability 8.9 or newer; the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return (
            "FP8 products need an NVIDIA GPU of compute capability 8.9 or newer (GeForce RTX 40, L40, H100); "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        )
    return None


def quantise_rows(x: torch.Tensor, out=None) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] (bf16, fp16, fp32) as (codes FP8 [M, K], scales float32 [M, 1]) with x = codes * scales.

    A row's scale is its largest magnitude / 448; a row of zeros has the scale of a magnitude of 1e-12. out: the pair to
    write into. Raises ValueError if x or out has another dtype, shape or layout.
    """
    if x.ndim != 2 or x.dtype not in FLOATS or not x.is_contiguous():
        raise ValueError(f"fp8.quantise_rows: expected a contiguous x [M, K] of bf16, fp16 or fp32, got {described(x)}")
    codes, scales = arguments.outputs(x.shape, FP8, x.device, out)
    if supported(x.device) is None:
        from . import fp8_triton

        return fp8_triton.quantise_rows(x, codes, scales)
    arguments.write(x, codes, scales)
    return codes, scales


def quantise_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] (bf16, fp16, fp32) as (codes FP8 [N, K], scales float32 [N]) with weight = codes * scales[n]."""
    codes, scales = quantise_rows(weight.contiguous())
    return codes, scales.view(-1)


def linear(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y [M, N] = (x x_scales) (weight weight_scales)^T + bias in dtype (bf16, fp16, fp32).

    x FP8 [M, K], x_scales float32 [M, 1], weight FP8 [N, K], weight_scales float32 [N], bias [N] or None. On a GPU that
    has FP8 products the result is rounded to bf16 first, the type in which row-wise scaled products come; K and N must
    be multiples of 16 there. Elsewhere the same values are multiplied in fp32. Raises ValueError on other shapes.
    """
    columns = weight.shape[1]
    shapes = {"x": (x, (len(x), columns), FP8), "x_scales": (x_scales, (len(x), 1), torch.float32)}
    shapes |= {"weight": (weight, (len(weight), columns), FP8)}
    shapes |= {"weight_scales": (weight_scales, (len(weight),), torch.float32)}
    for name, (tensor, shape, kind) in shapes.items():
        if tensor.shape != shape or tensor.dtype != kind or not tensor.is_contiguous():
            raise ValueError(
                f"fp8.linear: expected {name} to be a contiguous {list(shape)} of {kind}, got {described(tensor)}"
            )
    if supported(x.device) is not None:
        values, weight_values = x.float() * x_scales, weight.float() * weight_scales[:, None]
        return torch.nn.functional.linear(values, weight_values, None if bias is None else bias.float()).to(dtype)
    if columns % 16 or len(weight) % 16:
        raise ValueError(f"fp8.linear: weight is {list(weight.shape)}; FP8 tensor cores need multiples of 16")
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scales,
        scale_b=weight_scales[None],
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    ).to(dtype)
