"""RMSNorm of q and k with rotation of the halves of a head, for as many heads as each has."""

import pytest
import torch

from zimage_turbo.kernels import rope_half, rope_half_triton
from zimage_turbo.tests.unit.kernels.accuracy import error, normal, on_devices, poisoned, storable

EPS = 1e-6
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
sizes = on_devices(
    cpu=[(1, 3, 2, 1, 128), (2, 5, 9, 3, 64), (2, 2, 5, 5, 36)], cuda=[(2, 333, 16, 8, 128), (1, 512, 32, 8, 128)]
)  # B, S, H, G, D
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def eager(x, weight, table):
    """As the host composes it, every step rounded to x's dtype."""
    x = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)
    cos, sin = table.to(x.dtype)[:, None].unbind(-1)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def arguments(size, device, dtype):
    """q and k as a joint projection leaves them: their tokens lie apart."""
    batch, tokens, heads, groups, width = size
    joint = normal(batch, tokens, heads + 2 * groups, width, device=device, dtype=dtype, spread=4)
    weights = [(1 + normal(width, device=device, spread=0.2)).to(dtype) for _ in range(2)]
    phase = normal(tokens, width // 2, device=device, spread=9)
    table = torch.stack((phase.cos(), phase.sin()), -1)
    return joint[:, :, :heads], joint[:, :, heads : heads + groups], *weights, table


def check(turned, q, k, q_weight, k_weight, table):
    for ours, x, weight in ((turned[0], q, q_weight), (turned[1], k, k_weight)):
        exact = eager(x.double(), weight.double(), table.double())
        assert error(ours, exact) <= max(2 * error(eager(x, weight, table), exact), 5e-7)


@sizes
@dtypes
def test_qk_norm_rope_half(device, size, dtype):
    given = arguments(size, device, dtype)
    out = tuple(poisoned(x.shape, storable(dtype, device), device) for x in given[:2])
    rope_half_triton.qk_norm_rope_half(*given, EPS, out)
    check(out, *given)
    check(rope_half.qk_norm_rope_half(*given, EPS, backend="torch"), *given)


@sizes
def test_in_place(device, size):
    q, k, *rest = arguments(size, device, torch.float32)
    out = (q.contiguous().clone(), k.contiguous().clone())
    rope_half_triton.qk_norm_rope_half(*out, *rest, EPS, out)
    check(out, q, k, *rest)


def test_outputs_are_written_where_asked():
    given = arguments((2, 3, 4, 2, 64), "cpu", torch.float32)
    out = tuple(poisoned(x.shape, torch.float32, "cpu") for x in given[:2])
    turned = rope_half.qk_norm_rope_half(*given, EPS, out=out)
    assert turned[0] is out[0] and turned[1] is out[1]
    check(turned, *given)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"q": torch.zeros(2, 3, 64)}, r"q: expected \[B, S, H, D\] .* got \[2, 3, 64\]"),
        ({"q": torch.zeros(2, 3, 4, 63)}, "q: expected .* with an even D"),
        ({"k": torch.zeros(2, 3, 2, 32)}, "k: expected heads as q, .* got"),
        ({"k": torch.zeros(2, 3, 2, 64).half()}, "k: expected heads as q, .* of float16"),
        ({"k": torch.zeros(2, 3, 64, 2).transpose(2, 3)}, "a last stride of 1"),
        ({"q_weight": torch.ones(32)}, r"q_weight: expected a contiguous \[64\]"),
        ({"table": torch.zeros(4, 32, 2)}, r"table: expected a contiguous \[3, 32, 2\] of float32"),
        (
            {"out": (torch.zeros(2, 3, 4, 64), torch.zeros(2, 3, 4, 64))},
            r"out k: expected a contiguous \[2, 3, 2, 64\]",
        ),
        ({"backend": "triton"}, "needs an NVIDIA GPU"),
    ],
)
def test_refusals_name_what_was_given(change, complaint):
    weight = torch.ones(64)
    given = {"q": torch.zeros(2, 3, 4, 64), "k": torch.zeros(2, 3, 2, 64), "q_weight": weight, "k_weight": weight}
    with pytest.raises(ValueError, match=complaint):
        rope_half.qk_norm_rope_half(**{**given, "table": torch.zeros(3, 32, 2), "eps": EPS, **change})
