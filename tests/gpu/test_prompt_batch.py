"""Prompts of several lengths in one batch on a GPU: each row as exact as alone, by graphs, without waiting."""

import comfy.model_management as management
import pytest
import torch

from zimage_turbo.engine import turbo
from zimage_turbo.engine.graphs import WARM_UP, Graphs
from zimage_turbo.engine.model import load_model
from zimage_turbo.tests.comparison import relative_error
from zimage_turbo.tests.weights import small_transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
LENGTHS = (33, 1, 64, 32, 70, 20)
GROUPS = 3


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return small_transformer(tmp_path_factory.mktemp("weights") / "small.safetensors", layers=2)


def loaded(file, precision):
    """A model on the GPU, as the host puts it there before it samples."""
    patcher = load_model(file, precision)
    management.load_models_gpu([patcher])
    return patcher


def request_of(lengths, dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(lengths), 16, 32, 32, generator=generator)
    timesteps = torch.full((len(lengths),), 0.6)
    context = torch.randn(len(lengths), max(lengths), 256, generator=generator)
    return x.to("cuda", dtype), timesteps.cuda(), context.to("cuda", dtype)


def together(module, lengths, request):
    options = {"uuids": [str(lengths)]}
    return module._forward(*request, sum(lengths), transformer_options=options, prompt_lengths=lengths)


def alone(module, lengths, request):
    x, timesteps, context = request
    rows = [slice(i, i + 1) for i in range(len(lengths))]
    singles = [
        module._forward(x[row], timesteps[row], context[row, :length], length)
        for row, length in zip(rows, lengths, strict=True)
    ]
    return torch.cat(singles).float()


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8", "int4", "int4-fp8"])
def test_each_row_is_as_exact_as_alone(file, precision):
    """Together it differs from alone by less than alone differs from fp32."""
    patcher, whole = loaded(file, precision), loaded(file, "fp32")
    module = patcher.model.diffusion_model
    request = request_of(LENGTHS, patcher.model.get_dtype_inference())
    exact = alone(whole.model.diffusion_model, LENGTHS, [tensor.float() for tensor in request])
    one_by_one = alone(module, LENGTHS, request)
    for _ in range(WARM_UP + 1):
        rows = together(module, LENGTHS, request).float()
        for row, single, truth in zip(rows, one_by_one, exact, strict=True):
            assert relative_error(row, single) < relative_error(single, truth)


def test_groups_are_replayed_and_never_wait_for_the_gpu(file):
    patcher = loaded(file, "bf16")
    module, request = patcher.model.diffusion_model, request_of(LENGTHS, torch.bfloat16)
    computed = together(module, LENGTHS, request)
    together(module, LENGTHS, request)  # captures
    module.forwards.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        replayed = together(module, LENGTHS, request)
        module.captions.clear()
        together(module, LENGTHS, request)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert dict(module.forwards) == {turbo.REPLAYED: 2 * GROUPS}
    assert torch.equal(replayed, computed)


def test_more_groups_than_graphs_leave_each_others_graphs(file, monkeypatch):
    captured, capture = [], Graphs.capture
    monkeypatch.setattr(Graphs, "capture", lambda *given: captured.append(1) or capture(*given))
    patcher = loaded(file, "bf16")
    module = patcher.model.diffusion_model
    lengths = tuple(range(5, 5 + 32 * (turbo.MAX_GRAPHS + 2), 32))
    request = request_of(lengths, torch.bfloat16)
    results = [together(module, lengths, request) for _ in range(WARM_UP + 3)]
    assert len(captured) == turbo.MAX_GRAPHS
    assert module.forwards[turbo.REPLAYED] == 3 * turbo.MAX_GRAPHS
    assert all(torch.equal(result, results[0]) for result in results)
