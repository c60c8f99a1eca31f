"""Attention for Hopper: on such a GPU against the formula in float64; anywhere, its instructions.

Gluon has no interpreter, so without such a GPU nothing of it is computed.
"""

import itertools

import pytest
import torch

from zimage_turbo.kernels import registry
from zimage_turbo.tests.unit.kernels.accuracy import GPU, error, normal, poisoned
from zimage_turbo.tests.unit.kernels.compilation import compiled, described
from zimage_turbo.tests.unit.kernels.formula import exactly, formula

if not registry.has_gluon():
    pytest.skip("the kernel needs Triton 3.6 or newer", allow_module_level=True)
from zimage_turbo.kernels import attention_hopper_triton, hopper_tiles_triton

HOPPER = GPU and torch.cuda.get_device_capability()[0] == 9
requires_hopper = pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES.keys())
# B, H, S, T: whole tiles of 192 queries and blocks of 128 keys, one more or less, a few rows, more heads than programs,
# tiles of one, two and three units beside each other
SIZES = [
    (1, 2, 192, 128), (1, 2, 193, 129), (2, 3, 191, 255), (1, 1, 1, 1), (1, 3, 5, 300), (3, 2, 1000, 777),
    (1, 140, 64, 64), (1, 30, 4160, 4160), (2, 30, 1088, 1088), (1, 15, 2080, 4160), (1, 30, 4256, 300),
]  # fmt: skip


def arguments(size, dtype, spread=2):
    """As the forward has them: q and k by tokens, v a part of the fused projection; beyond them lies NaN."""
    batch, heads, queries, keys = size
    q, k = (
        normal(batch, tokens, heads, 128, device="cuda", dtype=dtype, spread=spread).transpose(1, 2)
        for tokens in (queries, keys)
    )
    qkv = poisoned((batch, keys, 3, heads, 128), dtype, "cuda")
    qkv[:, :, 2] = normal(batch, keys, heads, 128, device="cuda", dtype=dtype)
    return q, k, qkv[:, :, 2].transpose(1, 2)


@pytest.fixture(params=[None, 1], ids=["all programs", "one program"])
def shared_out(request, monkeypatch):
    """By as many programs as there are, whose tiles have one unit where that is soon done; by one, in full tiles."""
    if request.param:
        monkeypatch.setattr(attention_hopper_triton, "multiprocessors_of", lambda device: request.param)


@requires_hopper
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@dtypes
def test_within_the_error_of_the_formula(size, dtype, shared_out):
    q, k, v = arguments(size, dtype)
    exact = exactly(q, k, v)
    out = poisoned((size[0], size[2], size[1], 128), dtype, "cuda").transpose(1, 2)
    found = attention_hopper_triton.attention(q, k, v, None, out)
    assert found is out and error(out, exact) <= 2 * error(formula(q, k, v), exact)


@requires_hopper
def test_long_rows_and_many_turns_of_a_buffer():
    """2048x2048: 129 blocks of keys, 20 tiles a program, values with a mean in common. Twice the same bits."""
    q, k, v = arguments((1, 30, 16448, 16448), torch.bfloat16, spread=1)
    v += 0.5
    out = attention_hopper_triton.attention(q, k, v, None)
    for head in (0, 17, 29):
        own = [part[:, [head]] for part in (q, k, v)]
        assert error(out[:, [head]], exactly(*own)) < 3e-3
    assert torch.equal(out, attention_hopper_triton.attention(q, k, v, None))


@requires_hopper
def test_large_scores_do_not_overflow():
    q, k, v = arguments((1, 2, 300, 500), torch.bfloat16)
    q = q * 300
    assert error(attention_hopper_triton.attention(q, k, v, None), exactly(q, k, v)) < 6e-3


@requires_hopper
def test_nan_and_infinity_stay_visible_where_they_belong():
    q, k, v = arguments((1, 2, 300, 500), torch.bfloat16)
    q[0, 0, 7], v[0, 1, 499] = float("nan"), float("inf")
    out = attention_hopper_triton.attention(q, k, v, None)
    assert out[0, 0, 7].isnan().all() and torch.isfinite(out[0, 0, :7]).all() and torch.isfinite(out[0, 0, 8:]).all()
    assert not torch.isfinite(out[0, 1]).any()


@requires_hopper
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_any_layout(part):
    """Heads apart, rows that begin where the copy engine cannot read, and rows that are not a multiple of 16 bytes."""
    given = arguments((2, 3, 300, 200), torch.bfloat16)
    expected = attention_hopper_triton.attention(*given, None)
    batch, heads, tokens, width = given[part].shape
    apart = given[part].contiguous()
    memory = torch.zeros(given[part].numel() + 1, dtype=torch.bfloat16, device="cuda")
    shifted = memory[1:].view(batch, tokens, heads, width).transpose(1, 2).copy_(given[part])
    wide = torch.zeros(batch, tokens, heads * width + 1, dtype=torch.bfloat16, device="cuda")
    ragged = wide[:, :, :-1].unflatten(2, (heads, width)).transpose(1, 2).copy_(given[part])
    for other in (apart, shifted, ragged):
        assert torch.equal(attention_hopper_triton.attention(*given[:part], other, *given[part + 1 :], None), expected)


@requires_hopper
def test_it_replays_in_a_cuda_graph():
    q, k, v = arguments((1, 30, 1088, 1088), torch.bfloat16)
    eager = attention_hopper_triton.attention(q, k, v, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_hopper_triton.attention(q, k, v, None)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, eager)


@pytest.mark.parametrize("multiprocessors", [132, 114, 78, 1])
def test_tiles_are_as_many_as_take_no_further_turn(multiprocessors):
    for heads, queries in itertools.product((1, 7, 30, 200), (1, 64, 65, 192, 1088, 4160, 4256, 16448)):
        tiles, programs = hopper_tiles_triton.share_out(queries, heads, multiprocessors)
        units, fewest = -(-queries // 64), -(-queries // 192)
        assert fewest <= tiles <= units and programs == min(tiles * heads, multiprocessors)
        turns = -(-tiles * heads // multiprocessors)
        assert turns == -(-fewest * heads // multiprocessors)
        assert tiles == units or -(-(tiles + 1) * heads // multiprocessors) > turns


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_go_from_registers_to_the_tensor_core(pack, dtype):
    """Three groups of warps with 8 products for scores and 8 for values, in a loop and for what is around it."""
    rows = {"q_desc": 64, "k_desc": 128, "v_desc": 128, "out_desc": 64}
    types = {name: described(dtype, number, hopper_tiles_triton.layout(16)) for name, number in rows.items()}
    ptx, shared = compiled(pack, "attention_hopper_triton", types | {"factor": "fp32"}, {})
    assert ptx.count("wgmma.mma_async") == ptx.count("m64n128k16") == 3 * 2 * (8 + 8)
    assert "ld.shared.v4" not in ptx and "ldmatrix" not in ptx and "cp.async.bulk.tensor.2d" in ptx
    assert shared <= 227 * 1024
