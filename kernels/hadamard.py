"""The orthonormal Hadamard rotation of every 256 columns, which spreads outliers over their block."""

from functools import lru_cache

import torch

from .arguments import FLOATS, FP8, described, outputs, write
from .registry import Registry, Request, lazily, no_refusal, triton_refusal

BLOCK = 256
HADAMARD = Registry("hadamard")
HADAMARD_QUANTISE_ROWS = Registry("hadamard_quantise_rows")


@lru_cache(maxsize=32)
def matrix(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """H [256, 256]: symmetric, orthonormal (H H = 1), every entry ±1/16, hence exact in any float type."""
    with torch.inference_mode(False):
        signs = torch.ones(1, 1)
        while len(signs) < BLOCK:
            signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
        return (signs / 16).to(device, dtype)


def rotate(x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """x H for each block of 256 along the last dimension: [..., K] -> [..., K] in x's dtype (bf16, fp16, fp32, fp64).

    The rotation is its own inverse. Since (x H) (W H)^T = x W^T, rotating activations and weights changes no product.
    Raises ValueError on another dtype, and if K is not a multiple of 256.
    """
    columns = x.shape[-1]
    if columns % BLOCK:
        raise ValueError(f"hadamard.rotate: the last dimension is {columns}; it must be a multiple of {BLOCK}")
    if x.dtype not in FLOATS and x.dtype != torch.float64:
        raise ValueError(f"hadamard.rotate: expected bf16, fp16, fp32 or fp64, got {described(x)}")
    return HADAMARD.choose(backend, Request(x.device)).function(x)


def rotate_reference(x):
    return (x.reshape(-1, BLOCK) @ matrix(x.device, x.dtype)).view(x.shape)


def rotate_quantise_rows(x: torch.Tensor, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """fp8.quantise_rows(rotate(x)) of contiguous x [M, K] (bf16, fp16, fp32); in one pass on a GPU: it rounds once.

    Raises ValueError on another dtype, shape or layout, and if K is not a multiple of 256.
    """
    if x.ndim != 2 or x.shape[1] % BLOCK or x.dtype not in FLOATS or not x.is_contiguous():
        raise ValueError(
            f"hadamard.rotate_quantise_rows: expected a contiguous x [M, K] of bf16, fp16 or fp32, K a multiple of "
            f"{BLOCK}, got {described(x)}"
        )
    codes, scales = outputs(x.shape, FP8, x.device, None)
    HADAMARD_QUANTISE_ROWS.choose(backend, Request(x.device, quantise=True)).function(x, codes, scales)
    return codes, scales


def rotate_quantise_rows_reference(x, codes, scales):
    write(rotate_reference(x), codes, scales)


HADAMARD.register("torch", rotate_reference, no_refusal)
HADAMARD_QUANTISE_ROWS.register("triton", lazily("hadamard_triton", "rotate_quantise_rows"), triton_refusal)
HADAMARD_QUANTISE_ROWS.register("torch", rotate_quantise_rows_reference, no_refusal)
