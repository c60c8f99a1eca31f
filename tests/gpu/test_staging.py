"""Weights on their way to a GPU."""

import pytest
import torch

from zimage_turbo.engine import staging

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


@pytest.mark.parametrize("inference", [False, True])
def test_every_weight_arrives_as_it_was(inference):
    shapes = [(3, 5), (64, 4096), (1,), (0, 4), (7, 7)] * 8
    types = [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64]
    made = {f"{i}": torch.randint(0, 100, shape).to(types[i % 4]) for i, shape in enumerate(shapes)}
    left = {**made, "other": torch.zeros(1)}
    with torch.inference_mode(inference):
        arrived = dict(staging.taken(left, list(made), torch.device("cuda")))
    assert list(left) == ["other"] and list(arrived) == list(made)
    for name, weight in made.items():
        assert arrived[name].is_cuda and torch.equal(arrived[name].cpu().view(torch.uint8), weight.view(torch.uint8))
        assert arrived[name].dtype == weight.dtype


def test_a_weight_that_cannot_be_read_is_told_of():
    weights = {"first": torch.zeros(4), "second": torch.zeros(4, device="meta")}
    arriving = staging.taken(weights, ["first", "second"], torch.device("cuda"))
    next(arriving)
    with pytest.raises(NotImplementedError):
        next(arriving)
