"""SiLU times the other projection, in 16 bit and as FP8 rows."""

import pytest
import torch

from zimage_turbo.kernels import swiglu, swiglu_triton
from zimage_turbo.kernels.arguments import FP8
from zimage_turbo.tests.unit.kernels import accuracy
from zimage_turbo.tests.unit.kernels.accuracy import error, normal, on_devices, poisoned, storable

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
sizes = on_devices(cpu=[(1, 64), (5, 100), (3, 257), (2, 1)], cuda=[(77, 512), (333, 10240), (4224, 10240)])
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def eager(a, b):
    """As the host composes it, every step rounded to the dtype."""
    return torch.nn.functional.silu(a) * b


@sizes
@dtypes
@pytest.mark.parametrize("apart", [False, True], ids=["contiguous", "rows-apart"])
def test_silu_mul(device, size, dtype, apart):
    a, b = normal(size[0], 2 * size[1], device=device, dtype=dtype, spread=4).chunk(2, dim=1)
    if not apart:
        a, b = a.contiguous(), b.contiguous()
    exact = eager(a.double(), b.double())
    allowed = max(2 * error(eager(a, b), exact), 1e-6)
    y = poisoned(size, storable(dtype, device), device)
    swiglu_triton.silu_mul(a, b, 1.0, y, None)
    assert error(y, exact) <= allowed
    assert error(swiglu.silu_mul(a, b, backend="torch"), exact) <= allowed


@sizes
@dtypes
def test_fp8_rows(device, size, dtype):
    a, b = (normal(*size, device=device, dtype=dtype, spread=4) for _ in range(2))
    a[0], b[-1, : size[1] // 2] = 0, 0
    codes, row_scales = poisoned(size, FP8, device), poisoned((size[0], 1), torch.float32, device)
    swiglu_triton.silu_mul(a, b, 0.25, codes, row_scales)
    reference = swiglu.silu_mul(a, b, quantise=True, factor=0.25, backend="torch")
    exact = eager(a.double(), b.double()) / 4
    if size[0] > 1:
        assert error(accuracy.dequantised(*reference), exact) < 0.03
        accuracy.same_fp8((codes, row_scales), reference)
    largest = codes.float().abs().amax(-1)
    assert largest[0] == 0 and set(largest[1:-1].tolist()) <= {448.0}


@sizes
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_factor_keeps_fp16_finite(device, size, backend):
    """Products of up to 3e6, which fp16 holds only scaled; and a power of two rounds as no factor does."""
    a, b = (normal(*size, device=device, dtype=torch.float16).abs().clamp(0.01, 4) * 400 for _ in range(2))
    run = swiglu.silu_mul_reference if backend == "torch" else swiglu_triton.silu_mul
    exact = eager(a.double(), b.double()) / 64
    y = poisoned(size, torch.float16, device)
    run(a, b, 2.0**-6, y, None)
    assert torch.isfinite(y).all() and (y.double() - exact).abs().max() <= exact.abs().max() / 1024
    precise = [poisoned(size, torch.float32, device) for _ in range(2)]
    run(a, b, 1.0, precise[0], None)
    run(a, b, 2.0**-6, precise[1], None)
    assert torch.equal(precise[0], precise[1] * 64)


def test_nan_stays_visible_in_fp8():
    a, b = torch.ones(2, 64), torch.ones(2, 64)
    a[0, 3] = float("nan")
    values = accuracy.dequantised(*swiglu.silu_mul(a, b, quantise=True))
    assert torch.isnan(values[0]).any() and torch.isfinite(values[1]).all()


@pytest.mark.parametrize(
    ("width", "pieces"),
    [(1, (1, 0)), (64, (64, 0)), (100, (64, 64)), (3840, (2048, 2048)), (10240, (8192, 2048)), (8192, (8192, 0))],
)
def test_pieces_cover_a_row(width, pieces):
    assert swiglu_triton.row_pieces(width)[:2] == pieces and sum(pieces) >= width


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"a": torch.zeros(3)}, r"a: expected \[M, F\] of floats .* got \[3\]"),
        ({"b": torch.zeros(3, 63)}, r"b: expected \[3, 64\] of floats .* got \[3, 63\]"),
        ({"b": torch.zeros(64, 3).T}, "unit stride"),
        ({"factor": 3.0}, "factor: expected a power of two"),
        ({"factor": -2.0}, "factor: expected a power of two"),
        ({"out": torch.zeros(3, 65)}, r"out: expected a contiguous \[3, 64\]"),
    ],
)
def test_refusals_name_what_was_given(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        swiglu.silu_mul(**{"a": torch.zeros(3, 64), "b": torch.zeros(3, 64), **change})
