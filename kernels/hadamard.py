"""The orthonormal Hadamard rotation of every 256 columns, which spreads outliers over their block."""

from functools import lru_cache

import torch

from . import fp8
from .arguments import FP8, described

BLOCK = 256


@lru_cache(maxsize=32)
def matrix(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """H [256, 256]: symmetric, orthonormal (H H = 1), every entry ±1/16, hence exact in any float type."""
    with torch.inference_mode(False):
        signs = torch.ones(1, 1)
        while len(signs) < BLOCK:
            signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
        return (signs / 16).to(device, dtype)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """x H for each block of 256 along the last dimension: [..., K] -> [..., K] in x's dtype (bf16, fp16 or fp32).

    The rotation is its own inverse. Since (x H) (W H)^T = x W^T, rotating activations and weights changes no product.
    Raises ValueError if K is not a multiple of 256.
    """
    columns = x.shape[-1]
    if columns % BLOCK:
        raise ValueError(f"hadamard.rotate: the last dimension is {columns}; it must be a multiple of {BLOCK}")
    return (x.reshape(-1, BLOCK) @ matrix(x.device, x.dtype)).view(x.shape)


def rotate_quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8.quantise_rows(rotate(x)) of contiguous x [M, K]; in one pass on a GPU, which rounds only once."""
    if fp8.supported(x.device) is not None:
        return fp8.quantise_rows(rotate(x))
    from . import hadamard_triton

    if x.ndim != 2 or x.shape[1] % BLOCK or not x.is_contiguous():
        raise ValueError(
            f"hadamard.rotate_quantise_rows: expected a contiguous x [M, K], K a multiple of {BLOCK}, "
            f"got {described(x)}"
        )
    codes = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = torch.empty((len(x), 1), dtype=torch.float32, device=x.device)
    return hadamard_triton.rotate_quantise_rows(x, codes, scales)
