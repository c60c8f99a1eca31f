"""FP8 rows: quantising them, and their product."""

import pytest
import torch

from zimage_turbo.kernels import fp8, fp8_triton
from zimage_turbo.kernels.arguments import FP8, quantise_rows
from zimage_turbo.tests.unit.kernels.accuracy import dequantised, error, normal, on_devices, poisoned, same_fp8

sizes = on_devices(cpu=[(3, 64), (5, 272), (2, 1000)], cuda=[(4224, 3840), (333, 10240)])
products = on_devices(cpu=[(3, 64, 32), (17, 272, 48)], cuda=[(4224, 3840, 3840), (333, 10240, 3840)])


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantise_rows(device, size, dtype):
    x = normal(*size, device=device, dtype=dtype) * torch.logspace(-3, 3, size[0], device=device)[:, None].to(dtype)
    x[1] = 0
    out = poisoned(size, FP8, device), poisoned((size[0], 1), torch.float32, device)
    ours = fp8_triton.quantise_rows(x, *out)
    same_fp8(ours, quantise_rows(x))
    assert (ours[0][1].float() == 0).all()


def test_quantise_rows_is_as_close_as_three_bits_of_mantissa():
    x = normal(16, 512, device="cpu")
    assert error(dequantised(*fp8.quantise_rows(x)), x) < 2**-4 / 3**0.5


@products
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_linear(device, size, dtype, with_bias):
    """Twice the error of rounding the result to bf16, and as much again for the fast accumulation of tensor cores."""
    rows, columns, outputs = size
    x, x_scales = fp8.quantise_rows(normal(rows, columns, device=device, dtype=dtype))
    weight, weight_scales = fp8.quantise_weight(normal(outputs, columns, device=device, dtype=dtype, spread=0.02))
    bias = normal(outputs, device=device, dtype=dtype) if with_bias else None
    exact = dequantised(x, x_scales) @ dequantised(weight, weight_scales).T
    if with_bias:
        exact += bias.double()
    ours = fp8.linear(x, x_scales, weight, weight_scales, bias, dtype)
    assert ours.dtype == dtype
    allowed = 2 * error(exact.to(torch.bfloat16), exact)
    assert error(ours, exact) < (allowed if device == "cpu" else 2 * allowed)


@products
def test_product_is_what_the_scales_are_left_out_of(device, size):
    rows, columns, outputs = size
    x, x_scales = fp8.quantise_rows(normal(rows, columns, device=device))
    weight, weight_scales = fp8.quantise_weight(normal(outputs, columns, device=device, spread=0.02))
    exact = x.double() @ weight.double().T
    sums = fp8.product(x, weight)
    allowed = 2 * error(exact.to(torch.bfloat16), exact)
    assert sums.dtype == torch.bfloat16
    assert error(sums, exact) < (allowed if device == "cpu" else 2 * allowed)
    linear = fp8.linear(x, x_scales, weight, weight_scales, None, torch.bfloat16)
    assert error(sums.double() * x_scales * weight_scales, linear) < 2 * allowed


def test_the_largest_sums_are_held():
    x = torch.full((2, 10240), 448.0).to(FP8)
    assert error(fp8.product(x, x), torch.full((2, 2), 448.0**2 * 10240)) < 2**-8


def test_a_users_linear_is_not_passed_by(monkeypatch):
    sizes = torch.device("cpu"), torch.float16, 3, 16, 32
    assert fp8.multiplied_alike(*sizes)
    for op in (fp8.FP8_LINEAR, fp8.FP8_PRODUCT):
        monkeypatch.setattr(op, "backends", dict(op.backends))
    fp8.FP8_LINEAR.register("mine", fp8.linear_reference, lambda request: None, preferred=True)
    assert not fp8.multiplied_alike(*sizes)
    fp8.FP8_PRODUCT.register("mine", fp8.product_reference, lambda request: None, preferred=True)
    assert fp8.multiplied_alike(*sizes)


def test_supported_says_why_not():
    assert "compute capability 8.9" in fp8.supported("cpu")


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 4), torch.zeros(4, 6).t(), torch.zeros(2, 4, dtype=torch.int8)])
def test_quantise_rows_refuses(bad):
    with pytest.raises(ValueError, match=r"expected a contiguous x \[M, K\]"):
        fp8.quantise_rows(bad)


def test_linear_refuses_what_does_not_belong_together():
    x, x_scales = fp8.quantise_rows(torch.ones(2, 32))
    weight, weight_scales = fp8.quantise_weight(torch.ones(16, 32))
    with pytest.raises(ValueError, match="expected x_scales"):
        fp8.linear(x, x_scales.view(-1), weight, weight_scales, None, torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected weight to be a contiguous \[16, 32\] .* on cpu"):
        fp8.linear(x, x_scales, weight.to("meta"), weight_scales, None, torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected bias to be a contiguous \[16\]"):
        fp8.linear(x, x_scales, weight, weight_scales, torch.ones(1), torch.bfloat16)
    with pytest.raises(ValueError, match=r"fp8.product: expected weight to be a contiguous \[16, 32\] of .*e4m3fn"):
        fp8.product(x, weight.float())
    with pytest.raises(ValueError, match="expected dtype bfloat16, float16 or float32"):
        fp8.linear(x, x_scales, weight, weight_scales, None, torch.int8)
