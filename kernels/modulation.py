"""The modulation of all blocks at once: small linears of many layers, which read the same few rows.

Each alone is a launch that takes longer than its weights take to be read.
"""

from dataclasses import dataclass

import torch

from .arguments import FLOATS, described, outputs
from .registry import Registry, Request, lazily, no_refusal, triton_refusal

MOST_ROWS = 8  # that the Triton form takes: with more, a layer's product alone fills the GPU
MOST_LAYERS = 200  # of its launch, whose arguments are two addresses a layer, in 4 KB
MODULATION = Registry("modulation")


@dataclass(frozen=True, kw_only=True)
class ModulationRequest(Request):
    rows: int
    layers: int

    @property
    def key(self) -> str:
        return f"{super().key}, {self.rows} rows, {self.layers} layers"


def products(x, weights, biases, out=None, backend="auto"):
    """y[l] = x weights[l]^T + biases[l]

    x [B, K] of floats with unit stride in its rows; weights: L tensors [N, K]; biases: L tensors [N]; each list of one
    float type of its own, all contiguous and on x's device. Returns y [L, B, N] in x's dtype, in `out` if given. The
    backend "triton" sums in fp32 and rounds once; "torch" multiplies in x's dtype, to which weights are cast first.
    Raises ValueError on other shapes, dtypes or layouts.
    """
    if x.ndim != 2 or x.dtype not in FLOATS or x.stride(1) != 1:
        raise ValueError(f"x: expected floats [B, K] with unit stride in its rows, got {described(x)}")
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"weights, biases: expected as many of each, at least one, got {len(weights)} and {len(biases)}"
        )
    width = len(weights[0])
    _check(weights, "weights", (width, x.shape[1]), x.device)
    _check(biases, "biases", (width,), x.device)
    y, _ = outputs((len(weights), len(x), width), x.dtype, x.device, out)
    request = ModulationRequest(x.device, rows=len(x), layers=len(weights))
    MODULATION.choose(backend, request).function(x, weights, biases, y)
    return y


def products_reference(x, weights, biases, y):
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y[layer] = torch.nn.functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _check(tensors, name, shape, device):
    dtype = tensors[0].dtype
    for layer, tensor in enumerate(tensors):
        fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
        if not fits or dtype not in FLOATS or not tensor.is_contiguous():
            raise ValueError(
                f"{name}[{layer}]: expected a contiguous {list(shape)} of one float type on {device}, "
                f"got {described(tensor)}"
            )


def _triton_refusal(request):
    if request.rows > MOST_ROWS:
        return f"takes at most {MOST_ROWS} rows, got {request.rows}"
    if request.layers > MOST_LAYERS:
        return f"takes at most {MOST_LAYERS} layers, got {request.layers}"
    return triton_refusal(request)


MODULATION.register("triton", lazily("modulation_triton", "products"), _triton_refusal)
MODULATION.register("torch", products_reference, no_refusal)
