"""Weights on their way through a GPU."""

import pytest
import torch

from zimage_turbo.engine import staging

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]


@pytest.mark.parametrize("inference", [False, True])
def test_every_weight_returns_as_it_was(inference):
    shapes = [(3, 5), (64, 4096), (1,), (0, 4), (7, 7)] * 8
    types = [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64]
    given = {f"{i}": torch.randint(0, 100, shape).to(types[i % 4]) for i, shape in enumerate(shapes)}
    left, there = {**given, "other": torch.zeros(1)}, {}

    def make(name, weight):
        there[name] = weight.is_cuda
        return {f"{name} again": weight.clone(), f"{name} mark": torch.tensor(len(there))}

    with torch.inference_mode(inference):
        made = list(staging.passed(left, list(given), torch.device("cuda"), make))
    assert list(left) == ["other"] and there == dict.fromkeys(given, True) and len(made) == len(given)
    for place, ((name, weight), parts) in enumerate(zip(given.items(), made, strict=True), 1):
        again, mark = parts[f"{name} again"], parts[f"{name} mark"]
        assert again.device.type == mark.device.type == "cpu" and mark == place and again.dtype == weight.dtype
        assert torch.equal(again.view(torch.uint8), weight.view(torch.uint8))


def test_a_weight_that_cannot_be_read_is_told_of():
    weights = {"first": torch.zeros(4), "second": torch.zeros(4, device="meta")}
    made = staging.passed(weights, ["first", "second"], torch.device("cuda"), lambda name, weight: {name: weight})
    assert list(next(made)) == ["first"]
    with pytest.raises(NotImplementedError):
        next(made)
