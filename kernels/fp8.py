"""FP8 (e4m3fn) with one scale a row: quantising activations and weights, and their product on FP8 tensor cores."""

from functools import lru_cache

import torch

from . import arguments
from .arguments import FLOATS, FP8, check_tensor, described
from .registry import Registry, Request, capability, lazily, no_refusal, product_request, triton_refusal

CAPABILITY = (8, 9)
QUANTISE_ROWS = Registry("quantise_rows")
FP8_LINEAR = Registry("fp8_linear")
FP8_PRODUCT = Registry("fp8_product")


def supported(device: torch.device | str) -> str | None:
    """None if the device multiplies FP8, else the reason why not."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"FP8 products need an NVIDIA GPU of compute capability 8.9 or newer; the device is {device.type}"
    if torch.version.hip:
        return "FP8 products need an NVIDIA GPU of compute capability 8.9 or newer; this torch is built for ROCm"
    own = capability(device)
    if own < CAPABILITY:
        return (
            "FP8 products need an NVIDIA GPU of compute capability 8.9 or newer (GeForce RTX 40, L40, H100); "
            f"{torch.cuda.get_device_name(device)} has {own[0]}.{own[1]}"
        )
    return None


def quantise_rows(x: torch.Tensor, out=None, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] (bf16, fp16, fp32) as (codes FP8 [M, K], scales float32 [M, 1]) with x = codes * scales.

    A row's scale is its largest magnitude / 448; a row of zeros has the scale of a magnitude of 1e-12. out: the pair to
    write into. Raises ValueError if x or out has another dtype, shape or layout.
    """
    if x.ndim != 2 or x.dtype not in FLOATS or not x.is_contiguous():
        raise ValueError(f"fp8.quantise_rows: expected a contiguous x [M, K] of bf16, fp16 or fp32, got {described(x)}")
    codes, scales = arguments.outputs(x.shape, FP8, x.device, out)
    QUANTISE_ROWS.choose(backend, Request(x.device, quantise=True)).function(x, codes, scales)
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
    backend: str = "auto",
) -> torch.Tensor:
    """y [M, N] = (x x_scales) (weight weight_scales)^T + bias in dtype (bf16, fp16, fp32).

    x FP8 [M, K], x_scales float32 [M, 1], weight FP8 [N, K], weight_scales float32 [N], bias [N] or None. The backend
    "scaled_mm" multiplies on FP8 tensor cores and rounds the result to bf16 first, the type in which row-wise scaled
    products come; "torch" multiplies the same values in fp32. Raises ValueError on other shapes, dtypes or layouts.
    """
    (outputs, columns), rows = weight.shape, len(x)
    _check_factors("fp8.linear", x, weight)
    for name, scales, shape in (("x_scales", x_scales, (rows, 1)), ("weight_scales", weight_scales, (outputs,))):
        check_tensor("fp8.linear", name, scales, shape, torch.float32, x.device)
    check_bias(bias, outputs, x.device, "fp8.linear")
    if dtype not in FLOATS:
        raise ValueError(f"fp8.linear: expected dtype bfloat16, float16 or float32, got {dtype}")
    request = product_request(x.device, dtype, rows, outputs, columns)
    return FP8_LINEAR.choose(backend, request).function(x, x_scales, weight, weight_scales, bias, dtype)


def linear_reference(x, x_scales, weight, weight_scales, bias, dtype):
    values, weight_values = x.float() * x_scales, weight.float() * weight_scales[:, None]
    return torch.nn.functional.linear(values, weight_values, None if bias is None else bias.float()).to(dtype)


def scaled_mm(x, x_scales, weight, weight_scales, bias, dtype):
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scales,
        scale_b=weight_scales[None],
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    ).to(dtype)


def product(x: torch.Tensor, weight: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """y [M, N] = x weight^T in bf16, the bare sums: times x's and the weight's scales they are what `linear` gives.

    x FP8 [M, K], weight FP8 [N, K]. cuBLAS has faster kernels for a product without scales of rows. Sums are as large
    as 448² K, which fp16 cannot hold. Raises ValueError on other shapes, dtypes or layouts.
    """
    _check_factors("fp8.product", x, weight)
    request = product_request(x.device, torch.bfloat16, len(x), *weight.shape)
    return FP8_PRODUCT.choose(backend, request).function(x, weight)


def product_reference(x, weight):
    return torch.nn.functional.linear(x.float(), weight.float()).bfloat16()


def bare_scaled_mm(x, weight):
    one = _one(x.device)
    return torch._scaled_mm(x, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)


@lru_cache(maxsize=32)
def _one(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.ones((), device=device)


def multiplied_alike(device: torch.device, dtype: torch.dtype, rows: int, outputs: int, columns: int) -> bool:
    """Whether `linear` in dtype and `product` are left to backends of the same name.

    A user's own "fp8_linear" that comes first is not to be passed by with a `product` of ours.
    """
    sizes = (rows, outputs, columns)
    linear_by = FP8_LINEAR.choose("auto", product_request(device, dtype, *sizes))
    return linear_by.name == FP8_PRODUCT.choose("auto", product_request(device, torch.bfloat16, *sizes)).name


def _check_factors(op, x, weight):
    outputs, columns = weight.shape
    check_tensor(op, "x", x, (len(x), columns), FP8, x.device)
    check_tensor(op, "weight", weight, (outputs, columns), FP8, x.device)


def check_bias(bias: torch.Tensor | None, outputs: int, device: torch.device, name: str) -> None:
    """None, or a contiguous [outputs] of a float type; else a ValueError that begins with `name`."""
    if bias is None:
        return
    if bias.shape != (outputs,) or bias.dtype not in FLOATS or bias.device != device or not bias.is_contiguous():
        raise ValueError(
            f"{name}: expected bias to be a contiguous [{outputs}] of bf16, fp16 or fp32 on {device}, "
            f"got {described(bias)}"
        )


def _scaled_mm_refusal(request):
    reason = supported(request.device)
    if reason is None and (request.columns % 16 or request.outputs % 16):
        reason = (
            f"FP8 tensor cores need K and N that are multiples of 16, got K = {request.columns}, N = {request.outputs}"
        )
    return reason


QUANTISE_ROWS.register("triton", lazily("fp8_triton", "quantise_rows"), triton_refusal)
QUANTISE_ROWS.register("torch", arguments.write, no_refusal)
FP8_LINEAR.register("scaled_mm", scaled_mm, _scaled_mm_refusal)
FP8_LINEAR.register("torch", linear_reference, no_refusal)
FP8_PRODUCT.register("scaled_mm", bare_scaled_mm, _scaled_mm_refusal)
FP8_PRODUCT.register("torch", product_reference, no_refusal)
