"""Nearest upsampling of channels_last pictures, with the residual sum before it."""

import pytest
import torch

from zimage_turbo.kernels import upsample, upsample_triton
from zimage_turbo.tests.unit.kernels.accuracy import normal, on_devices, poisoned, storable

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
sizes = on_devices(cpu=[(1, 32, 1, 1), (2, 96, 5, 3), (3, 256, 4, 7)], cuda=[(1, 256, 512, 512), (3, 512, 65, 33)])


def picture(size, device, dtype):
    return normal(*size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)


@sizes
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("shifted", [True, False], ids=["shift", "plain"])
def test_every_value_in_its_four_places(device, size, dtype, residual, shifted):
    x = picture(size, device, dtype)
    h = picture(size, device, dtype) if residual else None
    shift = normal(size[1], device=device, dtype=dtype) if shifted else None
    total = x.float()
    if residual:
        total = total + h.float()
    if shifted:
        total = total + shift.float()[:, None, None]
    place = storable(dtype, device)
    exact = total.to(place).repeat_interleave(2, 2).repeat_interleave(2, 3)
    batch, channels, height, width = size
    y = poisoned((batch, channels, 2 * height, 2 * width), place, device).contiguous(memory_format=torch.channels_last)
    upsample_triton.upsample(x, h, shift, y)
    assert torch.equal(y, exact)
    reference = upsample.upsample(x, h, shift, backend="torch")
    assert torch.equal(reference, exact.to(dtype)) and reference.is_contiguous(memory_format=torch.channels_last)


def test_refusals_name_what_was_given():
    x = picture((1, 8, 2, 2), "cpu", torch.float32)
    with pytest.raises(ValueError, match="x: expected a channels_last"):
        upsample.upsample(x.contiguous())
    with pytest.raises(ValueError, match=r"h: expected a channels_last \[1, 8, 2, 2\]"):
        upsample.upsample(x, x[:, :4])
    with pytest.raises(ValueError, match=r"out: expected a channels_last \[1, 8, 4, 4\]"):
        upsample.upsample(x, out=x)
