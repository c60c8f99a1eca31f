"""The INT4 format: its decoding, its error, and its products."""

import subprocess
import sys

import pytest
import torch

from zimage_turbo.kernels import fp8, hadamard, int4
from zimage_turbo.kernels.arguments import FP8
from zimage_turbo.kernels.int4_shapes import SHAPES, levels, table
from zimage_turbo.tests.unit.kernels.accuracy import dequantised, error, normal, on_devices, poisoned

# Relative L2 errors of comfy-kitchen 0.2.40's W4A8 (4.5 bits a weight, rotated) on the tensors of `distributions`.
KITCHEN = {"gaussian": 0.0729, "t4": 0.0726, "t2.5": 0.0702, "outliers": 0.0709, "laplace": 0.0728, "demo": 0.0726}
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
shapes = on_devices(cpu=[(3, 70, 272), (1, 5, 512), (2, 64, 256)], cuda=[(64, 3840, 3840), (300, 2560, 9728)])


@pytest.fixture(scope="module")
def distributions(pack):
    from zimage_turbo.demo.checkpoint import load_state

    torch.manual_seed(77)
    student = torch.distributions.StudentT
    size = (256, 2048)
    found = {"gaussian": torch.randn(size), "t4": student(4.0).sample(size), "t2.5": student(2.5).sample(size)}
    found["outliers"] = torch.randn(size) * torch.where(torch.arange(size[1]) % 128 == 0, 8.0, 1.0)
    found["laplace"] = torch.distributions.Laplace(0.0, 1.0).sample(size)
    state = load_state(pack / "demo", "transformer")[1]
    layers = [w for name, w in state.items() if w.ndim == 2 and w.shape[1] == 256 and "layers" in name]
    found["demo"] = torch.cat([w for w in layers if len(w) != 1024][:12])
    return found


@pytest.mark.parametrize("name", KITCHEN)
def test_error_against_kitchen(distributions, name):
    weight = distributions[name]
    ours = int4.quantise(weight)
    assert ours.nbytes * 8 <= 4.5 * weight.numel() + 32 * len(weight)
    assert int4.relative_error(weight, ours) < KITCHEN[name] * (0.9 if name in ("gaussian", "demo") else 1)


def test_rotates_only_where_it_pays(distributions):
    assert not int4.quantise(distributions["gaussian"]).rotated
    assert int4.quantise(distributions["t2.5"]).rotated
    assert not int4.quantise(distributions["t2.5"][:, :272]).rotated


def test_constant_is_sorted_finite_and_below_256():
    value = levels(torch.device("cpu"))
    assert value.shape == (32, 16) == (len(SHAPES), len(bytes.fromhex(SHAPES[0])))
    assert (value.diff(dim=1) > 0).all() and (value.abs() < 256).all()


def test_every_drop_leaves_a_normal_number():
    """What lets kernels move an exponent by adding to its bits."""
    bytes_of_groups = table(torch.device("cpu"))
    assert bytes_of_groups.shape == (256, 16) and (bytes_of_groups & 0x78 != 0).all()


def test_decoding_by_the_documented_bits():
    """A reader written from the module's docstring alone, on bytes that no quantiser would choose."""
    rows, columns = 6, 48
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8)
    groups = torch.randint(256, (rows, columns // 16), dtype=torch.uint8)
    groups[0] = 7  # the largest drop
    scales = torch.exp2(torch.randint(-20, 20, (rows,)).float())
    expected = torch.zeros(rows, columns, dtype=torch.float64)
    for n in range(rows):
        for k in range(columns):
            code = codes[n, k // 2].item() >> (4 * (k % 2)) & 15
            shape, drop = groups[n, k // 16].item() >> 3, groups[n, k // 16].item() & 7
            byte = bytes.fromhex(SHAPES[shape])[code]
            byte -= 8 * drop
            exponent, mantissa = byte >> 3 & 15, byte & 7
            value = (8 + mantissa) * 2.0 ** (exponent - 10)
            expected[n, k] = (-value if byte & 128 else value) * scales[n].item()
    weight = int4.Int4Weight(codes, groups, scales, rotated=False)
    assert torch.equal(int4.expand(weight, torch.float32).double(), expected)
    assert torch.equal(int4.dequantise(weight, torch.float32).double(), expected)


@pytest.mark.parametrize("rotate", [False, True])
def test_expansions_agree(rotate):
    """FP8 bytes times scales, bf16 and fp32 are the same numbers; dequantise leaves the stored basis."""
    weight = int4.quantise(normal(37, 512, device="cpu"), rotate)
    exact = int4.expand(weight, torch.float32)
    assert torch.equal(int4.expand(weight, FP8).float() * weight.scales[:, None], exact)
    assert torch.equal(int4.expand(weight, torch.bfloat16).float(), exact)
    back = hadamard.rotate(exact) if rotate else exact
    assert torch.equal(int4.dequantise(weight, torch.bfloat16), back.to(torch.bfloat16))


def test_rows_of_zeros_and_of_any_size():
    weight = normal(6, 64, device="cpu")
    weight[1] = 0
    weight[2] *= 1e-30
    weight[3] *= 1e30
    weight[4, :48] = 0
    quantised = int4.quantise(weight)
    found = int4.dequantise(quantised, torch.float32)
    assert (found[1] == 0).all() and quantised.scales[1] == 0
    mantissa = torch.frexp(quantised.scales).mantissa
    assert torch.equal(mantissa[[0, 2, 3, 4, 5]], torch.full((5,), 0.5))
    for row in (0, 2, 3, 4, 5):
        assert error(found[row], weight[row]) < 0.1


def test_extreme_rows_keep_their_outlier():
    weight = normal(4, 256, device="cpu")
    weight[:, 100] = torch.tensor([1e4, -1e4, 3e4, 300.0])
    found = int4.dequantise(int4.quantise(weight, rotate=False), torch.float32)
    assert ((found[:, 100] - weight[:, 100]).abs() < 0.07 * weight[:, 100].abs()).all()


def test_stochastic_rounding_keeps_the_mean():
    """The mean of many roundings nears the weight as 1/sqrt(n); nearest rounding does not."""
    weight = normal(8, 128, device="cpu")
    seeds = range(1, 101)
    mean = sum(int4.dequantise(int4.quantise(weight, False, seed), torch.float32) for seed in seeds) / len(seeds)
    nearest = int4.relative_error(weight, int4.quantise(weight, False))
    assert error(mean, weight) < nearest / 2
    one = int4.quantise(weight, False, 7)
    assert torch.equal(one.codes, int4.quantise(weight, False, 7).codes)
    assert not torch.equal(one.codes, int4.quantise(weight, False, 8).codes)


@shapes
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_linear(device, size, dtype, with_bias):
    """Within twice the error of torch's own product in the same dtype, in the stored basis if that is rotated."""
    rows, outputs, columns = size
    weight = int4.quantise(normal(outputs, columns, device=device, spread=0.02), rotate=columns % 256 == 0)
    x = normal(2, rows, columns, device=device, dtype=dtype)
    bias = normal(outputs, device=device, dtype=dtype) if with_bias else None
    stored = int4.dequantise(weight, torch.float32).double()
    exact = torch.nn.functional.linear(x.double(), stored, None if bias is None else bias.double())
    if weight.rotated:
        plain = torch.nn.functional.linear(hadamard.rotate(x), hadamard.rotate(stored).to(dtype), bias)
    else:
        plain = torch.nn.functional.linear(x, stored.to(dtype), bias)
    ours = int4.linear(x, weight, bias)
    assert ours.shape == (2, rows, outputs) and ours.dtype == dtype
    assert error(ours, exact) < 2 * error(plain, exact)


@shapes
@pytest.mark.parametrize("workspace", [False, True], ids=["own", "workspace"])
def test_linear_fp8(device, size, workspace):
    """The weights are exact, so that the product differs from the exact one by the rounding of x to FP8 and of y."""
    rows, outputs, columns = size
    outputs = -(-outputs // 16) * 16
    weight = int4.quantise(normal(outputs, columns, device=device, spread=0.02), rotate=columns % 256 == 0)
    x = normal(rows, columns, device=device, dtype=torch.bfloat16)
    space = poisoned((outputs * columns + 5,), FP8, device) if workspace else None
    stored = int4.expand(weight, torch.float32).double()
    quantise_rows = hadamard.rotate_quantise_rows if weight.rotated else fp8.quantise_rows
    exact = dequantised(*quantise_rows(x)) @ stored.T
    ours = int4.linear_fp8(x, weight, workspace=space)
    allowed = 2 * error(exact.to(torch.bfloat16), exact)
    assert error(ours, exact) < (allowed if device == "cpu" else 2 * allowed)


@pytest.mark.parametrize("product", [int4.linear, int4.linear_fp8])
def test_takes_rows_that_lie_apart(product):
    weight, x = int4.quantise(normal(16, 64, device="cpu")), normal(5, 128, device="cpu")
    assert torch.equal(product(x[:, :64], weight), product(x[:, :64].contiguous(), weight))


def test_runs_without_triton(pack):
    """The CPU's path imports no Triton, which is not there on every machine."""
    script = """
import sys, types
sys.modules["triton"] = None
package = types.ModuleType("zimage_turbo")
package.__path__ = [sys.argv[1]]
sys.modules["zimage_turbo"] = package
import torch
from zimage_turbo.kernels import int4
weight = int4.quantise(torch.randn(32, 256))
x = torch.randn(3, 256)
print(int4.linear(x, weight).shape, int4.linear_fp8(x, weight).shape)
"""
    ran = subprocess.run([sys.executable, "-c", script, str(pack)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["torch.Size([3,", "32])"] * 2


def test_refusals():
    weight = int4.quantise(torch.ones(16, 32))
    with pytest.raises(ValueError, match="K that is a multiple of 16, got K = 40"):
        int4.quantise(torch.ones(4, 40))
    with pytest.raises(ValueError, match="K that is a multiple of 256, got K = 48"):
        int4.quantise(torch.ones(4, 48), rotate=True)
    with pytest.raises(ValueError, match="NaN or infinity"):
        int4.quantise(torch.tensor([[float("nan")] * 16]))
    with pytest.raises(ValueError, match="expected a weight"):
        int4.quantise(torch.ones(4, 4, 16))
    with pytest.raises(ValueError, match=r"expected x \[..., 32\]"):
        int4.linear(torch.ones(2, 48), weight)
    for bias in (torch.ones(17), torch.ones(32)[::2], torch.ones(16, dtype=torch.int32)):
        for product in (int4.linear, int4.linear_fp8):
            with pytest.raises(ValueError, match=r"expected bias to be a contiguous \[16\] of bf16"):
                product(torch.ones(2, 32), weight, bias)
    with pytest.raises(ValueError, match="expected dtype"):
        int4.expand(weight, torch.int8)
    with pytest.raises(ValueError, match="expected out"):
        int4.expand(weight, torch.float32, torch.empty(16, 16))
    with pytest.raises(ValueError, match="at least 512 elements"):
        int4.linear_fp8(torch.ones(2, 32), weight, workspace=torch.empty(511, dtype=FP8))
    with pytest.raises(ValueError, match=r"Int4Weight.codes: expected uint8"):
        int4.Int4Weight(weight.codes[0], weight.groups, weight.scales, rotated=False)
    with pytest.raises(ValueError, match=r"Int4Weight.groups: expected a contiguous \[16, 2\]"):
        int4.Int4Weight(weight.codes, weight.groups[:, :1], weight.scales, rotated=False)
