"""The rotation is orthonormal, its own inverse, and equal to its definition."""

import math

import pytest
import torch

from zimage_turbo.kernels import fp8, hadamard, hadamard_triton
from zimage_turbo.kernels.arguments import FP8
from zimage_turbo.tests.unit.kernels.accuracy import error, normal, on_devices, poisoned, same_fp8

CPU = torch.device("cpu")


def test_matrix_is_the_definition():
    """H[i, j] = (-1)^(number of ones in i & j) / 16."""
    signs = [[(-1) ** bin(i & j).count("1") / 16 for j in range(256)] for i in range(256)]
    assert torch.equal(hadamard.matrix(CPU, torch.float32), torch.tensor(signs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_twice_is_once(dtype):
    """Two roundings to dtype, and sums of 256 products in fp32, whose roundings add up like a random walk."""
    x = normal(2, 3, 512, device="cpu", dtype=dtype)
    twice = hadamard.rotate(hadamard.rotate(x))
    assert twice.shape == x.shape and twice.dtype == dtype
    assert error(twice, x) < 2 * torch.finfo(dtype).eps + 256**0.5 * torch.finfo(torch.float32).eps


def test_keeps_products_and_spreads_an_outlier():
    x, w = normal(5, 768, device="cpu"), normal(7, 768, device="cpu")
    assert error(hadamard.rotate(x) @ hadamard.rotate(w).T, x.double() @ w.double().T) < 1e-6
    outlier = torch.zeros(1, 256)
    outlier[0, 77] = 16.0
    assert torch.equal(hadamard.rotate(outlier).abs(), torch.ones(1, 256))
    assert math.isclose(hadamard.rotate(x).norm().item(), x.norm().item(), rel_tol=1e-5)


@on_devices(cpu=[(5, 768), (1, 256)], cuda=[(4224, 3840), (300, 10240)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_rotates_and_quantises(device, size, dtype):
    if device == "cuda" and fp8.supported(device):
        pytest.skip(fp8.supported(device))
    x = normal(*size, device=device, dtype=dtype)
    x[0] = 0
    codes, scales = poisoned(size, FP8, device), poisoned((size[0], 1), torch.float32, device)
    ours = hadamard_triton.rotate_quantise_rows(x, codes, scales)
    same_fp8(ours, fp8.quantise_rows(hadamard.rotate(x.float())))


def test_refuses_a_width_it_cannot_cut():
    with pytest.raises(ValueError, match="300; it must be a multiple of 256"):
        hadamard.rotate(torch.zeros(2, 300))


@pytest.mark.parametrize("bad", [torch.zeros(2, 300), torch.zeros(256), torch.zeros(256, 512).t()])
def test_one_pass_refuses(bad):
    with pytest.raises(
        ValueError, match=r"expected a contiguous x \[M, K\] of bf16, fp16 or fp32, K a multiple of 256"
    ):
        hadamard.rotate_quantise_rows(bad)


@pytest.mark.parametrize("rotation", [hadamard.rotate, hadamard.rotate_quantise_rows])
def test_refuses_integers(rotation):
    with pytest.raises(ValueError, match="bf16, fp16"):
        rotation(torch.zeros(2, 256, dtype=torch.int32))
