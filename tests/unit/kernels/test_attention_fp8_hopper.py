"""FP8 attention for Hopper: on such a GPU against the formula on what the codes stand for; anywhere, its instructions.

Gluon has no interpreter, so without such a GPU nothing of it is computed.
"""

import pytest
import torch

from zimage_turbo.kernels import attention_fp8, heads, registry
from zimage_turbo.tests.unit.kernels.accuracy import GPU, error, normal, poisoned
from zimage_turbo.tests.unit.kernels.compilation import compiled, described
from zimage_turbo.tests.unit.kernels.formula import decoded, decoded_values, exactly

if not registry.has_gluon():
    pytest.skip("the kernel needs Triton 3.6 or newer", allow_module_level=True)
from zimage_turbo.kernels import attention_fp8_hopper_triton, hopper_tiles_triton

HOPPER = GPU and torch.cuda.get_device_capability()[0] == 9
requires_hopper = pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
FP8 = torch.float8_e4m3fn
# B, H, S, T: whole tiles of 192 queries and blocks of 128 keys, one more or less, half a block, a few rows, more heads
# than programs, tiles of one, two and three units beside each other
SIZES = [
    (1, 2, 192, 128), (1, 2, 193, 129), (2, 3, 191, 255), (1, 2, 64, 192), (1, 1, 1, 1), (1, 3, 5, 300),
    (3, 2, 1000, 777), (1, 140, 64, 64), (1, 30, 4160, 4160), (2, 30, 1088, 1088), (1, 15, 2080, 4160),
    (1, 30, 4256, 300),
]  # fmt: skip
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))


def arguments(size, spread=1):
    """q and k as pairs, v in 16 bit. Values grow tenfold along the keys, so that blocks have scales of their own."""
    batch, number, queries, keys = size
    q, k, v = (
        normal(batch, tokens, number, 128, device="cuda", dtype=torch.bfloat16, spread=spread).transpose(1, 2)
        for tokens in (queries, keys, keys)
    )
    v = v * torch.logspace(-1, 0, keys, device="cuda").to(v.dtype)[:, None]
    return heads.quantise_heads(q), heads.quantise_heads(k), v


def exactly_of(q, k, v):
    values = heads.quantise_heads(v, transposed=True)
    return exactly(decoded(*q), decoded(*k), decoded_values(*values, v.shape[2]))


def out_of(q, dtype=torch.bfloat16):
    batch, number, tokens, width = q[0].shape
    return poisoned((batch, tokens, number, width), dtype, "cuda").transpose(1, 2)


@pytest.fixture(params=[None, 1], ids=["all programs", "one program"])
def shared_out(request, monkeypatch):
    """By as many programs as there are, whose tiles have one unit where that is soon done; by one, in full tiles."""
    if request.param:
        monkeypatch.setattr(attention_fp8_hopper_triton, "multiprocessors_of", lambda device: request.param)


@requires_hopper
@sizes
def test_within_the_error_of_the_other_kernel(size, shared_out):
    q, k, v = arguments(size)
    exact = exactly_of(q, k, v)
    found, other = (
        error(attention_fp8.attention_of_codes(kernel, q, k, v, out=out_of(q)), exact)
        for kernel in ("hopper-fp8", "triton-fp8")
    )
    assert found <= max(1.1 * other, 5e-3) and found < 0.04


@requires_hopper
@sizes
def test_rows(size, shared_out):
    """What attention_of_codes gives, times the factor, in FP8, with a scale an image."""
    q, k, v = arguments(size)
    batch, _, tokens, _ = size
    out = out_of(q, FP8).transpose(1, 2), poisoned((batch * tokens, 1), torch.float32, "cuda")
    codes, scales = attention_fp8.rows_of_codes("hopper-fp8", q, k, v, 0.5, out)
    values = codes.double() * scales.view(batch, tokens, 1, 1) * 2
    expected = attention_fp8.attention_of_codes("hopper-fp8", q, k, v).transpose(1, 2)
    _, others = attention_fp8.rows_of_codes("triton-fp8", q, k, v, 0.5)
    assert codes is out[0] and error(values, expected) <= 0.04 and error(scales, others) < 1e-6


@requires_hopper
def test_one_scale_for_all_queries_and_keys():
    """As the norm before it gives them: expanded, so that strides are zero."""
    (q, _), (k, _), v = arguments((2, 5, 700, 900))
    q, k = (
        (codes, torch.full((1, 1, 1), 2**-6, device="cuda").expand(2, 5, -(-codes.shape[2] // 64))) for codes in (q, k)
    )
    assert error(attention_fp8.attention_of_codes("hopper-fp8", q, k, v), exactly_of(q, k, v)) < 0.04


@requires_hopper
def test_twice_the_same_bits():
    q, k, v = arguments((1, 30, 4160, 4160))
    first, second = (attention_fp8.attention_of_codes("hopper-fp8", q, k, v) for _ in range(2))
    assert torch.equal(first, second)


@requires_hopper
def test_large_scores_do_not_overflow():
    (q, scales), k, v = arguments((1, 2, 300, 500))
    q = q, scales * 1024
    assert error(attention_fp8.attention_of_codes("hopper-fp8", q, k, v), exactly_of(q, k, v)) < 0.04


@requires_hopper
def test_nan_stays_visible_where_it_belongs():
    (q, scales), k, v = arguments((1, 2, 300, 500))
    q[0, 0, 7, 5] = float("nan")
    v[0, 1, 499, 3] = float("nan")
    out = attention_fp8.attention_of_codes("hopper-fp8", (q, scales), k, v)
    assert out[0, 0, 7].isnan().all() and torch.isfinite(out[0, 0, :7]).all() and torch.isfinite(out[0, 0, 8:]).all()
    assert out[0, 1, :, 3].isnan().all()


def test_lengths_are_refused():
    """Before anything is launched, so on any machine."""
    v = normal(1, 2, 70, 128, device="cpu")
    codes = heads.quantise_heads(v, backend="torch")
    with pytest.raises(ValueError, match="takes no lengths; take triton-fp8"):
        attention_fp8.attention_of_codes("hopper-fp8", codes, codes, v, torch.tensor([7]))


@pytest.mark.parametrize(("dtype", "quantise"), [("bf16", False), ("fp16", False), ("fp8e4nv", True)])
def test_weights_go_from_registers_to_the_tensor_core(pack, dtype, quantise):
    """Three groups of warps with 4 products for scores and 4 for values, in a loop and for what is around it. No sums
    of products go into the next product: the tensor core adds FP8 products to 14 bits."""
    rows = {"q_desc": ("fp8e4nv", 64), "k_desc": ("fp8e4nv", 128), "v_desc": ("fp8e4nv", 128), "out_desc": (dtype, 64)}
    types = {
        name: described(kind, number, hopper_tiles_triton.layout(8 if kind == "fp8e4nv" else 16))
        for name, (kind, number) in rows.items()
    }
    scales = {f"{name}_scale_ptr": "*fp32" for name in ("q", "k", "v", "row")}
    types |= scales | {"scale": "fp32", "factor": "fp32"}
    ptx, shared = compiled(pack, "attention_fp8_hopper_triton", types, {"QUANTISE": quantise})
    assert ptx.count("wgmma.mma_async") == ptx.count("m64n128k32.f32.e4m3.e4m3") == 3 * 2 * (4 + 4)
    assert "ld.shared.v4" not in ptx and "ldmatrix" not in ptx and "cp.async.bulk.tensor.2d" in ptx
    assert shared <= 227 * 1024
