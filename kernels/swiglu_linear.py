"""The gate of the feed-forward layer together with the two linears before it, SwiGLU (Shazeer 2020)."""

from dataclasses import dataclass

import torch

from . import fp8
from .arguments import FLOATS, FP8, check_power_of_two, check_tensor, described
from .registry import (
    ProductRequest,
    Registry,
    Request,
    has_tensor_descriptors,
    lazily,
    no_refusal,
    product_request,
    triton_refusal,
    version,
)
from .swiglu import SILU_MUL, silu_mul

FEWEST_ROWS = 1024  # of a fused product: of fewer it was not measured
LONGEST_STRIDE = 2**40  # bytes that the copy engine can step over
SWIGLU_LINEAR = Registry("swiglu_linear")
SWIGLU_LINEAR_FP8 = Registry("swiglu_linear_fp8")
Scaled = tuple[torch.Tensor, torch.Tensor]  # FP8 codes [N, K] and fp32 scales, of rows [M, 1] or of outputs [N]


@dataclass(frozen=True, kw_only=True)
class TwoWeightsRequest(ProductRequest):
    """The product with two weights of one shape, which begin `distance` bytes from each other. aligned: whether they
    and what they multiply begin at multiples of 16 bytes."""

    distance: int
    aligned: bool = True


def linear(x, gate_weight, value_weight, factor=1.0, backend="auto"):
    """y [M, F] = silu(x gate_weight^T) * (x value_weight^T) * factor, in x's dtype.

    x [M, K] and weights [F, K], contiguous, of one dtype (bf16, fp16, fp32). The backend "fused" rounds nothing but y;
    "apart" rounds both products to x's dtype, as two linears do. factor: as in `swiglu.silu_mul`. Raises ValueError on
    another factor, and on other shapes, dtypes or layouts.
    """
    request = _request("swiglu_linear.linear", FLOATS, x, gate_weight, value_weight, factor, x.dtype)
    return SWIGLU_LINEAR.choose(backend, request).function(x, gate_weight, value_weight, factor)


def linear_fp8(
    x: Scaled, gate_weight: Scaled, value_weight: Scaled, factor=1.0, dtype=torch.bfloat16, backend="auto"
) -> Scaled:
    """`linear` of FP8 rows and weights, each with its scales, as FP8 rows: (codes [M, F], row scales fp32 [M, 1]).

    The backend "fused" rounds to bf16 before it looks for the largest of a row; "apart" rounds both products to dtype
    (bf16, fp16, fp32). Raises ValueError as `linear` does, and on scales of another shape, dtype or layout.
    """
    codes = [each[0] for each in (x, gate_weight, value_weight)]
    request = _request("swiglu_linear.linear_fp8", (FP8,), *codes, factor, dtype)
    if dtype not in FLOATS:
        raise ValueError(f"swiglu_linear.linear_fp8: expected dtype bfloat16, float16 or float32, got {dtype}")
    shapes = {"x": (request.rows, 1), "gate_weight": (request.outputs,), "value_weight": (request.outputs,)}
    for (name, shape), (_, scales) in zip(shapes.items(), (x, gate_weight, value_weight), strict=True):
        check_tensor("swiglu_linear.linear_fp8", f"the scales of {name}", scales, shape, torch.float32, x[0].device)
    return SWIGLU_LINEAR_FP8.choose(backend, request).function(x, gate_weight, value_weight, factor, dtype)


def linear_apart(x, gate_weight, value_weight, factor):
    products = (torch.nn.functional.linear(x, weight) for weight in (gate_weight, value_weight))
    return silu_mul(*products, factor=factor)


def linear_fp8_apart(x, gate_weight, value_weight, factor, dtype):
    products = (fp8.linear(*x, *weight, None, dtype) for weight in (gate_weight, value_weight))
    return silu_mul(*products, quantise=True, factor=factor)


def _request(op, dtypes, x, gate_weight, value_weight, factor, dtype):
    columns = x.shape[-1]
    _check_operand(op, x, "x", (len(x), columns), x, dtypes)
    _check_operand(op, gate_weight, "gate_weight", (len(gate_weight), columns), x, dtypes)
    _check_operand(op, value_weight, "value_weight", tuple(gate_weight.shape), x, dtypes)
    check_power_of_two(factor, "factor")
    return TwoWeightsRequest(
        x.device,
        quantise=x.dtype == FP8,
        dtype=dtype,
        rows=len(x),
        outputs=len(gate_weight),
        columns=columns,
        distance=abs(value_weight.data_ptr() - gate_weight.data_ptr()),
        aligned=not any(tensor.data_ptr() % 16 for tensor in (x, gate_weight, value_weight)),
    )


def _check_operand(op, tensor, name, shape, x, dtypes):
    fits = tensor.shape == shape and tensor.dtype == x.dtype and tensor.device == x.device and tensor.is_contiguous()
    if not fits or x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        expected = f"a contiguous [M, K] of {names}" if tensor is x else f"{list(shape)}, like x"
        raise ValueError(f"{op}: expected {name} to be {expected}, got {described(tensor)}")


def _fused_refusal(request):
    """The kernel is made for Hopper's copy engine and its widest product."""
    reason = triton_refusal(request)
    if reason is not None:
        return reason
    if SILU_MUL.choose("auto", Request(request.device, request.quantise)).name != "triton":
        return "silu_mul is left to another backend"
    if request.capability[0] != 9:
        return "is made for GPUs of compute capability 9.0 (Hopper), this one has {}.{}".format(*request.capability)
    if not has_tensor_descriptors():
        return f"needs Triton 3.4 or newer, here is {version('triton')}"
    if request.dtype == torch.float32:
        return "takes bfloat16 and float16, got float32"
    if request.rows < FEWEST_ROWS:
        return f"takes {FEWEST_ROWS} rows or more, got {request.rows}"
    multiple = 16 if request.quantise else 8
    if request.columns % multiple or request.outputs % multiple:
        return f"takes K and F that are multiples of {multiple}, got K = {request.columns}, F = {request.outputs}"
    if not request.aligned:
        return "takes tensors that begin at multiples of 16 bytes"
    if not 0 < request.distance < LONGEST_STRIDE:
        return f"takes two weights that begin less than 2**40 bytes from each other, got {request.distance}"
    return None


def _fused_fp8_refusal(request):
    reason = _fused_refusal(request)
    if reason is not None:
        return reason
    sizes = request.rows, request.outputs, request.columns
    if fp8.FP8_LINEAR.choose("auto", product_request(request.device, request.dtype, *sizes)).name != "scaled_mm":
        return "fp8_linear is left to another backend"
    return None


SWIGLU_LINEAR.register("fused", lazily("swiglu_linear_triton", "linear"), _fused_refusal)
SWIGLU_LINEAR.register("apart", linear_apart, no_refusal)
SWIGLU_LINEAR_FP8.register("fused", lazily("swiglu_linear_triton", "linear_fp8"), _fused_fp8_refusal)
SWIGLU_LINEAR_FP8.register("apart", linear_fp8_apart, no_refusal)
