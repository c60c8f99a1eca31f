"""Queries, keys and values in FP8, a scale for each block of tokens of a head."""

import pytest
import torch

from zimage_turbo.kernels import heads, heads_triton
from zimage_turbo.tests.unit.kernels import accuracy
from zimage_turbo.tests.unit.kernels.accuracy import error, normal, on_devices, poisoned

sizes = on_devices(cpu=[(1, 2, 33, 64), (2, 1, 130, 32), (1, 1, 64, 48)], cuda=[(2, 3, 1000, 128), (1, 30, 4160, 128)])
FP8 = torch.float8_e4m3fn


@sizes
@pytest.mark.parametrize("transposed", [False, True], ids=["keys", "values"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_against_the_reference(device, size, transposed, dtype):
    batch, number, tokens, width = size
    x = normal(batch, tokens, number, width, device=device, dtype=dtype).transpose(1, 2)
    x[:, :, : heads.BLOCK] *= 300
    expected = heads.quantise_heads(x, transposed, backend="torch")
    codes, scales = (poisoned(part.shape, part.dtype, device) for part in expected)
    heads_triton.quantise_heads(x, codes, scales, transposed)
    assert torch.equal(scales, expected[1])
    accuracy.same_fp8((codes, scales), expected)


def test_codes_stand_for_the_values():
    x = normal(2, 3, 100, 64, device="cpu")
    codes, scales = heads.quantise_heads(x)
    dense = codes.double() * scales.double().repeat_interleave(heads.BLOCK, 2)[:, :, :100, None]
    assert error(dense, x) < 0.03  # half a unit of 3 bits is at most 1/16, 0.026 of the norm on average
    assert (scales.log2() == scales.log2().round()).all()
    values, transposed_scales = heads.quantise_heads(x, transposed=True)
    assert values.shape == (2, 3, 64, 128) and torch.equal(scales, transposed_scales)
    ordered = values.float().unflatten(3, (-1, 32))[..., torch.argsort(heads.TOKEN_ORDER)].flatten(3)
    assert torch.equal(ordered[..., :100], codes.float().transpose(2, 3))
    assert not ordered[..., 100:].any()


def test_a_block_of_zeros():
    codes, scales = heads.quantise_heads(torch.zeros(1, 1, 5, 16))
    assert not codes.float().any() and scales.item() > 0


@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 5, 64), torch.zeros(1, 2, 5, 24), torch.zeros(1, 1, 64, 16).mT],
    ids=["rank", "width", "stride"],
)
def test_refusals_name_what_was_given(x):
    with pytest.raises(ValueError, match=r"expected floats \[B, H, S, D\].*got \["):
        heads.quantise_heads(x)
