"""The orthonormal Hadamard rotation of every 256 columns, which spreads outliers over their block."""

from functools import lru_cache

import torch

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
