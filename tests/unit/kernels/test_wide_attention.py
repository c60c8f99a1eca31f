"""Attention of one wide head, in runs of queries."""

import pytest
import torch

from zimage_turbo.kernels import wide_attention, wide_attention_triton
from zimage_turbo.tests.unit.kernels.accuracy import error, normal, on_devices

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# (batch, queries, keys, width)
sizes = on_devices(
    cpu=[(1, 1, 1, 32), (2, 35, 35, 64), (1, 7, 61, 48)], cuda=[(1, 4096, 4096, 512), (2, 1000, 17001, 512)]
)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """Neither function takes memory to write to, which could be given poisoned: torch poisons what they ask for."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would ask for an environment variable
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def attention(q, k, v):
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


@sizes
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("run", [3, 1000], ids="runs of {}".format)
def test_wide_attention(device, size, dtype, run, monkeypatch):
    """At most twice the error of torch's own attention in the dtype, or what one unit of fp32 in the largest logit, up
    to some 45, does to its weight."""
    batch, queries, keys, width = size
    if device == "cuda":
        run *= 100
    monkeypatch.setattr(wide_attention, "SCORES_BYTES", 4 * keys * run)
    monkeypatch.setattr(wide_attention_triton, "BLOCK", 32 if device == "cpu" else wide_attention_triton.BLOCK)
    q = normal(batch, queries, width, device=device, dtype=dtype, spread=4)
    k, v = (normal(batch, keys, width, device=device, dtype=dtype, spread=2) for _ in range(2))
    exact = attention(q.double(), k.double(), v.double())
    rounded = torch.nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    largest = (q.float() @ k.float().mT).abs().max().item() * width**-0.5
    allowed = max(2 * error(rounded, exact), largest * 2**-23)
    for out in (wide_attention.wide_attention(q, k, v, backend="torch"), wide_attention_triton.wide_attention(q, k, v)):
        assert out.dtype == dtype and out.is_contiguous()
        assert error(out, exact) <= allowed


@sizes
def test_weights_and_their_sums(device, size, monkeypatch):
    monkeypatch.setattr(wide_attention_triton, "BLOCK", 32 if device == "cpu" else wide_attention_triton.BLOCK)
    scores = normal(size[1], size[2], device=device, spread=20)
    exact = ((scores.double() - scores.double().amax(1, keepdim=True)) * 0.25).exp()
    weights, sums = wide_attention_triton.weights_of(scores, torch.float32, 0.25)
    assert error(weights, exact) < 5e-6 and error(sums, exact.sum(1, keepdim=True)) < 5e-6
    assert weights.amax(1).eq(1).all()


@pytest.mark.parametrize(
    "change",
    [{"q": torch.zeros(5, 32)}, {"k": torch.zeros(1, 5, 33)}, {"v": torch.zeros(1, 5, 32).half()},
     {"q": torch.zeros(1, 32, 5).mT}],
    ids=["no batch", "width", "dtype", "layout"],
)  # fmt: skip
def test_refusals_name_what_was_given(change):
    given = {name: torch.zeros(1, 5, 32) for name in "qkv"} | change
    with pytest.raises(ValueError, match=r"q, k, v: expected contiguous \[B, S, D\].* got \[") as caught:
        wide_attention.wide_attention(**given)
    assert all(str(list(tensor.shape)) in str(caught.value) for tensor in given.values())
