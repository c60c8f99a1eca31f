"""Heads laid out in chunks and joined again: each value where the exchange between ranks expects it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from zimage_turbo.kernels import chunks, chunks_triton, rope
from zimage_turbo.tests.unit.kernels.accuracy import (
    dequantised,
    error,
    normal,
    on_devices,
    poisoned,
    same_fp8,
    storable,
)  # fmt: skip

EPS = 1e-5
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
sizes = on_devices(
    cpu=[(1, 3, 2, 128), (2, 5, 7, 64), (3, 2, 5, 36)], cuda=[(2, 333, 13, 128), (1, 1056, 30, 128)]
)  # B, S, H, D
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
counts = pytest.mark.parametrize("count", [1, 3, 8])


@given(some.integers(0, 200), some.integers(1, 20))
def test_runs_are_as_even_as_can_be(count, parts):
    lengths = [end - first for first, end in pairwise(chunks.bounds(count, parts))]
    assert sum(lengths) == count and len(lengths) == parts
    assert max(lengths) - min(lengths) <= 1 and lengths == sorted(lengths, reverse=True)


def test_thirty_heads():
    assert chunks.bounds(30, 4) == [0, 8, 16, 23, 30]
    assert chunks.bounds(30, 8) == [0, 4, 8, 12, 16, 20, 24, 27, 30]


def arguments(size, device, dtype, per_image=False):
    batch, tokens, heads, width = size
    qkv = normal(batch, tokens, 3, heads, width, device=device, dtype=dtype, spread=4)
    weights = [(1 + normal(width, device=device, spread=0.2)).to(dtype) for _ in range(2)]
    phase = normal(*([batch] if per_image else []), tokens, width // 2, device=device, spread=9)
    return qkv, *weights, torch.stack((phase.cos(), phase.sin()), -1)


def value(buffer, size, parts, count, part, image, token, head):
    """The D values of one head, by the formula of the module's text."""
    batch, tokens, heads, width = size
    chunk = next(i for i, end in enumerate(chunks.bounds(heads, count)[1:]) if head < end)
    first, end = chunks.bounds(heads, count)[chunk : chunk + 2]
    place = first * tokens * batch * parts
    place += ((token * batch + image) * parts + part) * (end - first) + head - first
    return buffer[place * width : (place + 1) * width]


parts = pytest.mark.parametrize(
    "part", [slice(0, 3), slice(1, 3), slice(0, 1), slice(2, 3)], ids=["qkv", "kv", "q", "v"]
)


@sizes
@dtypes
@counts
@parts
def test_head_chunks(device, size, dtype, count, part):
    qkv, *gains, table = arguments(size, device, dtype, per_image=size[0] == 2)
    x, gains = qkv[:, :, part], gains[part]
    out = poisoned((x.numel(),), storable(dtype, device), device)
    chunks_triton.head_chunks(x, gains, table, EPS, count, out)
    rounded = chunks.head_chunks(x, gains, table, EPS, count, backend="torch")
    exact = chunks.head_chunks(x.float(), [gain.float() for gain in gains], table, EPS, count, backend="torch")
    assert error(out, exact) <= max(2 * error(rounded, exact), 5e-7)


@counts
@parts
def test_every_value_is_where_the_text_says(count, part):
    size = batch, tokens, heads, _ = (2, 3, 5, 8)
    qkv, *gains, table = arguments(size, "cpu", torch.float32)
    x = qkv[:, :, part]
    out = chunks.head_chunks(x, gains[part], table, EPS, count)
    for place, expected in enumerate(rope.qk_norm_rope(qkv, *gains, table, EPS)[part]):
        for image, head, token in torch.cartesian_prod(*map(torch.arange, (batch, heads, tokens))).tolist():
            found = value(out, size, x.shape[2], count, place, image, token, head)
            assert torch.equal(found, expected[image, head, token])


@sizes
@dtypes
@counts
def test_join_chunks(device, size, dtype, count):
    batch, tokens, heads, width = size
    dtype = storable(dtype, device)
    buffer = normal(batch * tokens * heads * width, device=device, dtype=dtype)
    out = poisoned((batch, tokens, heads * width), dtype, device)
    chunks_triton.join_chunks(buffer, size, count, 0.25, out, None)
    assert torch.equal(out, chunks.join_chunks(buffer, size, count, factor=0.25, backend="torch"))
    image, token, head = batch - 1, tokens // 2, heads - 1
    expected = value(buffer, size, 1, count, 0, image, token, head) * 0.25
    assert torch.equal(out.view(batch, tokens, heads, width)[image, token, head], expected)


@sizes
@counts
def test_join_chunks_in_fp8(device, size, count):
    batch, tokens, heads, width = size
    buffer = normal(batch * tokens * heads * width, device=device, dtype=torch.float16)
    out = poisoned((batch, tokens, heads * width), torch.float8_e4m3fn, device)
    scales = poisoned((batch * tokens, 1), torch.float32, device)
    chunks_triton.join_chunks(buffer, size, count, 0.5, out, scales)
    same_fp8((out, scales), chunks.join_chunks(buffer, size, count, True, 0.5, backend="torch"))
    plain = chunks.join_chunks(buffer, size, count, factor=0.5, backend="torch")
    if device == "cuda":
        assert error(dequantised(out, scales), plain) < 0.04


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda x: chunks.join_chunks(x, (1, 3, 2, 9), 2), r"buffer: expected a contiguous \[54\] of torch.float32"),
        (lambda x: chunks.join_chunks(x, (1, 3, 2, 8), 2, factor=0.3), "factor: expected a power of two"),
        (lambda x: chunks.join_chunks(x.int(), (1, 3, 2, 8), 2), "buffer: expected bf16, fp16 or fp32"),
        (lambda x: given_chunks(out=x), r"out: expected a contiguous \[144\] of torch.float32"),
        (lambda x: given_chunks(out=torch.zeros(144).half()), r"out: expected a contiguous \[144\]"),
        (lambda x: given_chunks(x=torch.zeros(1, 3, 3, 8, 2).transpose(3, 4)), r"x: expected \[B, S, n, H, D\]"),
        (lambda x: given_chunks(x=torch.zeros(2, 4, 3, 2, 8)[:, :3]), "tokens equally far apart"),
        (lambda x: given_chunks(x=torch.zeros(1, 3, 1, 2, 8)), "gains: expected at most 1"),
        (lambda x: given_chunks(gains=(torch.ones(9),)), r"gains: expected a contiguous \[8\]"),
        (lambda x: given_chunks(table=x), "table: expected"),
    ],
)
def test_refusals_name_what_was_given(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call(torch.zeros(48))


def given_chunks(**change):
    x, *gains, table = arguments((1, 3, 2, 8), "cpu", torch.float32)
    return chunks.head_chunks(**{"x": x, "gains": gains, "table": table, "eps": EPS, "chunks": 2} | change)
