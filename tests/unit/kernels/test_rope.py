"""RMSNorm of q and k with rotation, and the layouts in which they leave."""

import pytest
import torch

from zimage_turbo.kernels import rope, rope_triton
from zimage_turbo.tests.unit.kernels.accuracy import error, normal, on_devices, poisoned, same_fp8, storable

EPS = 1e-5
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
sizes = on_devices(
    cpu=[(1, 3, 2, 128), (2, 5, 3, 64), (2, 2, 5, 36)], cuda=[(2, 333, 2, 128), (1, 4224, 30, 128)]
)  # B, S, H, D
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def eager(x, weight, table):
    """One of q, k [B, S, H, D], every step rounded to x's dtype, the rotation as a product of complex numbers."""
    x = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = torch.view_as_complex(x.to(precise).unflatten(-1, (-1, 2)).contiguous())
    turns = torch.view_as_complex(table.to(precise).contiguous()).unsqueeze(-2)
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype).transpose(1, 2)


def arguments(size, device, dtype, per_image=False):
    batch, tokens, heads, width = size
    qkv = normal(batch, tokens, 3, heads, width, device=device, dtype=dtype, spread=4)
    weights = [(1 + normal(width, device=device, spread=0.2)).to(dtype) for _ in range(2)]
    phase = normal(*([batch] if per_image else []), tokens, width // 2, device=device, spread=9)
    return qkv, *weights, torch.stack((phase.cos(), phase.sin()), -1)


def check(q, k, qkv, q_weight, k_weight, table):
    for ours, part, weight in ((q, 0, q_weight), (k, 1, k_weight)):
        exact = eager(qkv[:, :, part].double(), weight.double(), table.double())
        rounded = eager(qkv[:, :, part], weight, table)
        assert error(ours, exact) <= max(2 * error(rounded, exact), 5e-7)


@sizes
@dtypes
@pytest.mark.parametrize("per_image", [False, True], ids=["one-table", "table-per-image"])
def test_qk_norm_rope(device, size, dtype, per_image):
    batch, tokens, heads, width = size
    given = arguments(size, device, dtype, per_image)
    out = [poisoned((batch, heads, tokens, width), storable(dtype, device), device) for _ in range(2)]
    rope_triton.qk_norm_rope(*given, EPS, out, None)
    check(*out, *given)
    check(*rope.qk_norm_rope(*given, EPS, backend="torch")[:2], *given)


@sizes
def test_any_layout(device, size):
    """q in heads' order, k in tokens' order inside a wider buffer."""
    batch, tokens, heads, width = size
    given = arguments(size, device, torch.float16)
    q = poisoned((batch, heads, tokens, width), torch.float16, device)
    wide = poisoned((batch, tokens + 1, heads, width), torch.float16, device)
    k = wide[:, :-1].transpose(1, 2)
    rope_triton.qk_norm_rope(*given, EPS, (q, k), None)
    check(q, k, *given)
    assert torch.isnan(wide[:, -1]).all()


@sizes
def test_in_place(device, size):
    given = arguments(size, device, torch.float32)
    qkv = given[0].clone()
    rope_triton.qk_norm_rope(qkv, *given[1:], EPS, (qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)), None)
    check(qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2), *given)
    assert torch.equal(qkv[:, :, 2], given[0][:, :, 2])


@sizes
def test_fp8_codes(device, size):
    """The scale is that of a bound which holds for any input."""
    batch, tokens, heads, width = size
    given = arguments(size, device, torch.float16)
    given[0][:, :, :, :, 0] *= 1000  # nearly all of a head in one channel: as large as a value can become
    expected = rope.qk_norm_rope(*given, EPS, quantise=True, backend="torch")
    out = [poisoned((batch, heads, tokens, width), torch.float8_e4m3fn, device) for _ in range(2)]
    scales = poisoned((2,), torch.float32, device)
    rope_triton.qk_norm_rope(*given, EPS, out, scales)
    exact = rope.qk_norm_rope(*(part.float() for part in given), EPS, backend="torch")
    for codes, scale, (reference, its_scales), rotated in zip(out, scales, expected, exact, strict=False):
        assert its_scales.shape == (batch, heads, -(-tokens // 64)) and (its_scales - scale).abs().max() <= 1e-6 * scale
        same_fp8((codes, scale), (reference, its_scales[0, 0, 0]))
        assert (rotated.abs() <= 448 * scale).all()
        assert error(reference.float() * scale, rotated) <= 2**-4  # half a unit of 3 bits: here most values are alike


def test_layouts_of_the_public_op():
    given = arguments((2, 3, 5, 64), "cpu", torch.float32)
    q, k, v = rope.qk_norm_rope(*given, EPS)
    assert q.is_contiguous() and k.is_contiguous() and q.shape == v.shape == (2, 5, 3, 64)
    assert v.data_ptr() == given[0][:, :, 2].data_ptr()
    by_tokens = rope.qk_norm_rope(*given, EPS, layout="tokens")
    assert all(torch.equal(*pair) for pair in zip(by_tokens, (q, k, v), strict=True))
    assert all(tensor.transpose(1, 2).is_contiguous() for tensor in by_tokens[:2])


@pytest.mark.parametrize("movedim", [False, True])
def test_table_from_the_hosts_rotation_matrices(movedim):
    phase = normal(2, 7, 32, device="cpu", spread=9)
    rotations = torch.stack((phase.cos(), -phase.sin(), phase.sin(), phase.cos()), -1).unflatten(-1, (2, 2))
    rotations = rotations.unsqueeze(2 if movedim else 1)
    assert torch.equal(rope.angles(rotations), torch.stack((phase.cos(), phase.sin()), -1))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"qkv": torch.zeros(2, 3, 2, 5, 64)}, r"qkv: expected a contiguous \[B, S, 3, H, D\]"),
        ({"qkv": torch.zeros(2, 3, 3, 5, 63)}, "with an even D"),
        ({"q_weight": torch.ones(32)}, r"q_weight: expected a contiguous \[64\]"),
        ({"table": torch.zeros(4, 32, 2)}, r"table: expected a contiguous \[3, 32, 2\] of float32"),
        ({"table": torch.zeros(3, 32, 2).half()}, "got .* of float16"),
        ({"layout": "rows"}, "layout: expected .* got 'rows'"),
        ({"out": (torch.zeros(2, 5, 3, 64),)}, "out: expected 2 tensors"),
        ({"out": (torch.zeros(2, 3, 5, 64),) * 2}, r"out: expected \[2, 5, 3, 64\]"),
    ],
)
def test_refusals_name_what_was_given(change, complaint):
    weight = torch.ones(64)
    given = {"qkv": torch.zeros(2, 3, 3, 5, 64), "q_weight": weight, "k_weight": weight, "eps": EPS}
    with pytest.raises(ValueError, match=complaint):
        rope.qk_norm_rope(**{**given, "table": torch.zeros(3, 32, 2), **change})
