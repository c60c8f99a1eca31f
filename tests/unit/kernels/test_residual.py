"""The residual stream held as its norm, against the stream itself in float64."""

import pytest
import torch

from zimage_turbo.kernels import norm, residual, residual_triton
from zimage_turbo.tests.unit.kernels.accuracy import error, normal, on_devices, poisoned, storable

EPS = 1e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = {torch.float32: 1e-6, torch.bfloat16: 2**-8}  # a value's relative error: fp32's last bits, half a unit of bf16
sizes = on_devices(cpu=[(1, 3, 64), (2, 5, 100), (3, 2, 257)], cuda=[(2, 77, 256), (1, 4160, 3840), (2, 333, 3840)])
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
backends = pytest.mark.parametrize("backend", ["triton", "torch"])
BACKENDS = {"triton": residual_triton.add, "torch": residual.add_reference}


def vectors(size, device, dtype=torch.float32):
    """post_weight, gate, next_weight, scale; gates and scales are chunks of a wider tensor, as in the model."""
    batch, _, width = size
    weights = [1 + normal(width, device=device, spread=0.2) for _ in range(2)]
    gate, scale = normal(batch, 2 * width, device=device, spread=0.2).to(dtype).chunk(2, dim=1)
    return weights[0].to(dtype), gate, weights[1].to(dtype), scale


def exact_sum(x, h, post_weight, gate):
    branch = torch.nn.functional.rms_norm(h.double(), h.shape[-1:], post_weight.double(), EPS)
    return x.double() + (branch if gate is None else gate.double().tanh()[:, None] * branch)


def exact_norm(x, weight, scale):
    y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight.double(), EPS)
    return y if scale is None else y * (1 + scale.double()[:, None])


def stored(held):
    """The stream that a norm stands for, in float64."""
    gain = held.weight.double() * (1 if held.scale is None else 1 + held.scale.double()[:, None])
    return held.y.double() * held.rms.double().view(*held.y.shape[:2], 1) / gain


def run(backend, x, h, post_weight, gate, next_weight, scale):
    """One addition, into poisoned outputs."""
    held = x if isinstance(x, residual.Normed) else residual.Normed(x, None, None, None)
    y = poisoned(h.shape, storable(held.y.dtype, h.device.type), h.device)
    rms = None if next_weight is None else poisoned((h.shape[:2].numel(), 1), torch.float32, h.device)
    BACKENDS[backend](held, h, post_weight, gate, next_weight, scale, EPS, y, rms)
    return y if rms is None else residual.Normed(y, rms, next_weight, scale)


@sizes
@dtypes
@backends
@pytest.mark.parametrize("modulated", [True, False], ids=["scale", "plain"])
def test_additions_one_after_another(device, size, dtype, backend, modulated):
    """From a tensor to a norm, from norm to norm, and to a tensor: every step to a rounding of its own."""
    x = normal(*size, device=device, dtype=dtype, spread=3)
    before, found = x.double(), x
    for step in range(4):
        h = normal(*size, device=device, dtype=dtype, spread=7)
        post_weight, gate, next_weight, scale = vectors(size, device, dtype)
        gate, scale = (gate, scale) if modulated else (None, None)
        exact = exact_sum(before, h, post_weight, gate)
        if step == 3:
            next_weight = scale = None
        found = run(backend, found, h, post_weight, gate, next_weight, scale)
        if step == 3:
            assert error(found, exact) < ROUNDS[dtype]
            return
        assert error(found.y, exact_norm(exact, next_weight, scale)) < ROUNDS[dtype]
        assert error(stored(found), exact) < ROUNDS[dtype]
        before = stored(found)


@on_devices(cpu=[(2, 40, 512)], cuda=[(1, 4160, 3840)])
@backends
def test_it_is_rounded_as_often_as_a_stream_of_its_own(device, size, backend):
    """Over ten halves of blocks in bf16 the stream and its norms are as near to float64's as those of `norm`."""
    bf16 = torch.bfloat16
    x = normal(*size, device=device, dtype=bf16, spread=3)
    exact, held, apart = x.double(), x, x.clone()
    for _ in range(10):
        h = normal(*size, device=device, dtype=bf16, spread=7)
        post_weight, gate, next_weight, scale = given = vectors(size, device, bf16)
        exact = exact_sum(exact, h, post_weight, gate)
        held = (
            residual.add(held, h, *given, EPS, backend="torch") if backend == "torch" else run(backend, held, h, *given)
        )
        apart, y = norm.residual_rms_modulate(apart, h, *given, EPS, backend="torch")
    assert error(held.y, exact_norm(exact, next_weight, scale)) < 1.1 * error(y, exact_norm(exact, next_weight, scale))
    assert error(stored(held), exact) < 1.1 * error(apart, exact)


@sizes
@backends
def test_columns_that_are_multiplied_by_nothing_are_kept(device, size, backend):
    """A gain of zero, of a weight or of a scale of -1, does not forget the stream below it, nor leaks it into y."""
    x, h, more = (normal(*size, device=device, spread=3) for _ in range(3))
    post_weight, gate, next_weight, scale = vectors(size, device)
    next_weight[1], next_weight[2] = 0.0, 1e-30
    scale[:, 3] = -1.0
    held = run(backend, x, h, post_weight, gate, next_weight, scale)
    lost = [1, 2, 3]
    assert held.y[..., lost].abs().max() < 1e-9
    again = run(backend, held, more, post_weight, gate, None, None)
    exact = exact_sum(exact_sum(x, h, post_weight, gate), more, post_weight, gate)
    assert error(again[..., lost], exact[..., lost]) < 1e-5
    assert error(again, exact) < 1e-6


@sizes
@backends
def test_rows_of_zeros_and_of_large_values(device, size, backend):
    x, h, more = (normal(*size, device=device, spread=spread) for spread in (1e5, 1e30, 3))
    x[:, -1] = h[:, -1] = 0
    given = vectors(size, device)
    held = run(backend, x, h / 1e15, *given)
    assert not held.y[:, -1].any()
    again = run(backend, held, more, *given[:2], None, None)
    assert error(again, exact_sum(exact_sum(x, h / 1e15, *given[:2]), more, *given[:2])) < 1e-6


@sizes
def test_in_place(device, size):
    """What is written may be what is read, as a tensor and as a norm, also where a program's next rows are ahead."""
    x, h = normal(*size, device=device, spread=3), normal(*size, device=device)
    given = vectors(size, device)
    first = residual.add(x, h, *given, EPS, backend="torch")
    second = residual.add(first, h, *given, EPS, backend="torch")
    last = residual.add(second, h, *given[:2], None, None, EPS, backend="torch")
    rms = poisoned((size[0] * size[1], 1), torch.float32, device)
    held = residual.Normed(x, rms, *given[2:])
    residual_triton.add(residual.Normed(x, None, None, None), h, *given, EPS, x, rms)
    assert error(x, first.y) < 1e-6
    residual_triton.add(held, h, *given, EPS, x, rms)
    assert error(x, second.y) < 1e-6
    residual_triton.add(held, h, *given[:2], None, None, EPS, x, None)
    assert error(x, last) < 1e-6


def test_outputs_are_written_where_asked():
    x, h = normal(1, 3, 64, device="cpu"), normal(1, 3, 64, device="cpu")
    given = vectors(x.shape, "cpu")
    apart = residual.add(x, h, *given, EPS)
    held = residual.add(x, h, *given, EPS, out=x)
    assert held.y is x and torch.equal(x, apart.y) and apart.y is not x
    assert held.weight is given[2] and held.scale is given[3]
    assert residual.add(held, h, *given[:2], None, None, EPS, out=x) is x


@pytest.mark.parametrize("rows", [1, 2, 3], ids=lambda rows: f"rows{rows}")
@on_devices(cpu=[(3, 5, 64), (2, 1, 72)], cuda=[(2, 4160, 3840)])
def test_rows_of_a_program_belong_to_one_image(device, size, rows):
    x, h = normal(*size, device=device), normal(*size, device=device)
    given = vectors(size, device)
    expected = residual.add(x, h, *given, EPS, backend="torch")
    y, rms = poisoned(size, torch.float32, device), poisoned((size[0] * size[1], 1), torch.float32, device)
    split = (rows, 8 if size[2] > 1024 else 1, 3)
    residual_triton.add(residual.Normed(x, None, None, None), h, *given, EPS, y, rms, split=split)
    assert error(y, expected.y) < 1e-6 and error(rms, expected.rms) < 1e-6
    again = residual.add(expected, h, *given, EPS, backend="torch")
    residual_triton.add(residual.Normed(y, rms, *given[2:]), h, *given, EPS, y, rms, split=split)
    assert error(y, again.y) < 1e-6 and error(rms, again.rms) < 1e-6


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.ones(2, 3, 8, dtype=torch.float16)}, r"^x: expected a contiguous \[B, S, D\] of bfloat16/float32"),
        ({"h": torch.ones(2, 4, 8)}, r"^h: expected a contiguous .*2, 3, 8"),
        ({"post_weight": torch.ones(7)}, "^post_weight: "),
        ({"gate": torch.ones(3, 8)}, r"^gate: expected \[2, 8\]"),
        ({"next_weight": torch.ones(2, 8)}, "^next_weight: "),
        ({"next_weight": None}, "^scale: belongs to the next norm"),
        ({"scale": torch.ones(2, 9)}, r"^scale: expected \[2, 8\]"),
        ({"out": torch.ones(2, 3, 8, dtype=torch.bfloat16)}, "^out: "),
        ({"x": residual.Normed(torch.ones(2, 3, 8), torch.ones(5, 1), torch.ones(8), None)}, r"^x.rms: .*\[6, 1\]"),
        ({"x": residual.Normed(torch.ones(2, 3, 8), torch.ones(6, 1), torch.ones(9), None)}, "^x.weight: "),
        ({"x": residual.Normed(torch.ones(2, 3, 8), torch.ones(6, 1), torch.ones(8), torch.ones(8))}, "^x.scale: "),
    ],
)
def test_refusals_name_what_was_given(change, complaint):
    x, row = torch.ones(2, 3, 8), torch.ones(8)
    given = {
        "x": x,
        "h": x,
        "post_weight": row,
        "gate": torch.ones(2, 8),
        "next_weight": row,
        "scale": torch.ones(2, 8),
    }
    with pytest.raises(ValueError, match=complaint):
        residual.add(**{**given, **change}, eps=EPS)
