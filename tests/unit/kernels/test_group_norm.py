"""GroupNorm with bias, SiLU and residual sum on channels_last pictures."""

import pytest
import torch

from zimage_turbo.kernels import group_norm, group_norm_triton
from zimage_turbo.tests.unit.kernels.accuracy import GPU, error, normal, on_devices, poisoned, storable

EPS = 1e-6
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# (batch, channels, height, width): groups of one channel, of three, of a power of two, of ten; odd sides
sizes = on_devices(
    cpu=[(1, 4, 1, 3), (2, 12, 7, 5), (1, 32, 13, 11), (2, 40, 9, 17)],
    cuda=[(1, 512, 128, 128), (2, 256, 77, 131), (1, 128, 1024, 1024), (3, 512, 33, 65)],
)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """In the interpreter, where programs are slow and sizes small: so that each takes several steps nevertheless."""
    if not GPU:
        monkeypatch.setattr(group_norm_triton, "PROGRAMS", 2)
        monkeypatch.setattr(group_norm_triton, "TILE", 1024)
        monkeypatch.setattr(group_norm_triton, "MERGED", 16)


def groups_of(channels: int) -> int:
    """The model's 32, where they fit."""
    return 4 if channels % 32 else 32


def picture(size, device, dtype, spread=1.0, mean=0.0):
    x = mean + normal(*size, device=device, spread=spread)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def poisoned_picture(size, dtype, device):
    return poisoned(size, dtype, device).contiguous(memory_format=torch.channels_last)


def arguments(size, device, dtype, mean=0.0):
    """x, h, weight, bias, shift; the mean varies from channel to channel as the shift does."""
    channels = size[1]
    weight = (1 + normal(channels, device=device, spread=0.2)).to(dtype)
    bias, shift = (normal(channels, device=device, dtype=dtype, spread=0.5) for _ in range(2))
    return picture(size, device, dtype, 2, mean), picture(size, device, dtype, 3), weight, bias, shift


def eager(x, weight, bias, silu):
    """As the host composes it, every step rounded to the dtype."""
    y = torch.nn.functional.group_norm(x.contiguous(), groups_of(x.shape[1]), weight, bias, EPS)
    return torch.nn.functional.silu(y) if silu else y


def in_double(function, *tensors):
    return function(*(tensor.double() if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors))


def added(x, h, shift):
    return x + h + shift[:, None, None]


def within_twice(ours, rounded, exact, last_bits=1e-6):
    """At most twice the error of the same formula in the low precision (fp32: at least of its last bits)."""
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert error(ours, exact) <= max(2 * error(rounded, exact), last_bits)


def four_roundings(x, shift) -> float:
    """Relative error that four roundings in fp32 make: 2^-24 of a group's numbers each, beside the group's spread."""
    grouped = (x.shape[0], groups_of(x.shape[1]), -1)
    shift = shift.double()[:, None, None]
    size = (x.double().abs() + shift.abs()).reshape(grouped).square().mean(-1)
    spread = (x.double() + shift).reshape(grouped).var(-1, unbiased=False)
    return 4 * 2**-24 * (size / spread).mean().sqrt().item()


@sizes
@dtypes
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
def test_group_norm(device, size, dtype, silu):
    x, _, weight, bias, _ = arguments(size, device, dtype)
    exact, rounded = in_double(eager, x, weight, bias, silu), eager(x, weight, bias, silu)
    y = poisoned_picture(size, storable(dtype, device), device)
    group_norm_triton.group_norm(x, groups_of(size[1]), weight, bias, EPS, silu, None, y)
    within_twice(y, rounded, exact)
    within_twice(group_norm.group_norm(x, groups_of(size[1]), weight, bias, EPS, silu, backend="torch"), rounded, exact)


@sizes
@dtypes
def test_shift_is_part_of_what_is_normalised(device, size, dtype):
    """In place, as the decoder has it."""
    x, h, weight, bias, shift = arguments(size, device, dtype)
    shift *= 5
    last_bits = max(1e-6, four_roundings(x, shift))  # three numbers of a group can lie close together, far from zero
    zero = torch.zeros_like(h)
    exact = eager(in_double(added, x, zero, shift), weight.double(), bias.double(), True)
    rounded = eager(added(x, zero, shift), weight, bias, True)
    ours = group_norm.group_norm(x, groups_of(size[1]), weight, bias, EPS, True, shift, backend="torch")
    within_twice(ours, rounded, exact, last_bits)
    x = x.to(storable(dtype, device))
    group_norm_triton.group_norm(x, groups_of(size[1]), weight, bias, EPS, True, shift, x)
    within_twice(x, rounded, exact, last_bits)


@sizes
@dtypes
@pytest.mark.parametrize("shifted", [True, False], ids=["shift", "plain"])
def test_residual_group_norm(device, size, dtype, shifted):
    x, h, weight, bias, shift = arguments(size, device, dtype)
    given = shift if shifted else None
    shift = shift if shifted else torch.zeros_like(shift)
    exact_sum, rounded_sum = in_double(added, x, h, shift), added(x, h, shift)
    exact = eager(exact_sum, weight.double(), bias.double(), True)
    rounded = eager(rounded_sum, weight, bias, True)
    ours = group_norm.residual_group_norm(x, h, groups_of(size[1]), weight, bias, EPS, True, given, backend="torch")
    within_twice(ours[0], rounded_sum, exact_sum)
    within_twice(ours[1], rounded, exact)
    x_out, y = (poisoned_picture(size, storable(dtype, device), device) for _ in range(2))
    group_norm_triton.residual_group_norm(x, h, groups_of(size[1]), weight, bias, EPS, True, given, x_out, y)
    within_twice(x_out, rounded_sum, exact_sum)
    within_twice(y, rounded, exact)
    x, h = x.to(x_out.dtype), h.to(x_out.dtype)  # and in place, as the decoder has it
    group_norm_triton.residual_group_norm(x, h, groups_of(size[1]), weight, bias, EPS, True, given, x, h)
    assert torch.equal(x, x_out) and torch.equal(h, y)


@sizes
@pytest.mark.parametrize("mean", [100.0, 3000.0])
def test_a_large_mean_costs_no_digits(device, size, mean):
    """The error stays what fp32 makes of numbers of that size, 2^-24 of the mean beside a spread of 2."""
    if size[2] == 1:
        pytest.skip("needs more than a line")
    x, h, weight, bias, shift = arguments(size, device, torch.float32, mean)
    y = poisoned_picture(size, torch.float32, device)
    group_norm_triton.group_norm(x, groups_of(size[1]), weight, bias, EPS, False, None, y)
    assert error(y, in_double(eager, x, weight, bias, False)) < max(1e-6, 2**-24 * mean)
    x_out = poisoned_picture(size, torch.float32, device)
    group_norm_triton.residual_group_norm(x, h, groups_of(size[1]), weight, bias, EPS, False, shift, x_out, y)
    assert error(y, in_double(eager, x_out, weight, bias, False)) < max(1e-6, 2**-24 * mean)


@sizes
def test_the_same_every_time(device, size):
    x, _, weight, bias, _ = arguments(size, device, torch.float32)
    results = [poisoned_picture(size, torch.float32, device) for _ in range(2)]
    for y in results:
        group_norm_triton.group_norm(x, groups_of(size[1]), weight, bias, EPS, True, None, y)
    assert torch.equal(*results)


def test_groups_are_kept_apart():
    """Any number of groups; each has a mean of zero and a spread of one, whatever its neighbours hold."""
    x = picture((2, 12, 6, 5), "cpu", torch.float32)
    x[:, :4] *= 100
    for groups in (1, 3, 12):
        y = group_norm.group_norm(x, groups, torch.ones(12), torch.zeros(12), EPS)
        grouped = y.unflatten(1, (groups, -1))
        assert grouped.mean((2, 3, 4)).abs().max() < 1e-5
        assert (grouped.var((2, 3, 4), correction=0) - 1).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(2, 64, 3, 3)}, r"x: expected a channels_last \[B, C, H, W\] .* got \[2, 64, 3, 3\]"),
        ({"x": torch.zeros(2, 64, 3)}, "x: expected a channels_last"),
        ({"groups": 31}, "groups: expected a divisor of the 64 channels of x, got 31"),
        ({"weight": torch.ones(63)}, r"weight: expected a contiguous \[64\]"),
        ({"shift": torch.ones(64, dtype=torch.int8)}, "shift: .* got .* of int8"),
        ({"out": torch.zeros(2, 64, 3, 3)}, "out: expected a channels_last"),
        ({"backend": "triton"}, "triton: needs an NVIDIA GPU, the tensors are on cpu"),
    ],
)
def test_refusals_name_what_was_given(change, complaint):
    given = {
        "x": picture((2, 64, 3, 3), "cpu", torch.float32),
        "groups": 32,
        "weight": torch.ones(64),
        "bias": torch.zeros(64),
        "eps": EPS,
    }
    with pytest.raises(ValueError, match=complaint):
        group_norm.group_norm(**{**given, **change})


def test_a_residual_of_another_kind_is_refused():
    x = picture((1, 64, 3, 3), "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"h: expected a channels_last \[1, 64, 3, 3\] of torch.float32 on cpu"):
        group_norm.residual_group_norm(x, x.half(), 32, torch.ones(64), torch.ones(64), EPS)
