"""What happens when GPU memory runs out while CUDA graphs hold some. On a GPU: tests/gpu/test_graphs.py."""

import types

import comfy.model_management as management
import pytest
import torch

from zimage_turbo.engine.model import load_model
from zimage_turbo.engine.shortage import with_room
from zimage_turbo.tests.weights import small_transformer

CPU = torch.device("cpu")


class Short:
    """A function that finds no memory for its first calls."""

    def __init__(self, failures: int):
        self.failures, self.calls = failures, 0

    def __call__(self, x):
        self.calls += 1
        if self.calls <= self.failures:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return x + 1


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Those of a loaded model, which seem to hold memory on the CPU."""
    patcher = load_model(small_transformer(tmp_path_factory.mktemp("weights") / "small.safetensors", layers=1))
    management.load_models_gpu([patcher])
    yield patcher.model.diffusion_model.graphs
    management.unload_model_and_clones(patcher)


@pytest.fixture(autouse=True)
def holding(graphs, monkeypatch):
    for name, value in (("pool", (0, 1)), ("stream", types.SimpleNamespace(device=CPU)), ("given_up", False)):
        monkeypatch.setattr(graphs, name, value)


def test_what_fits_leaves_the_graphs(graphs):
    assert with_room(Short(0), torch.zeros(1)) == 1
    assert not graphs.given_up and graphs.pool


def test_a_shortage_gives_up_the_graphs_and_tries_again(graphs, caplog):
    assert with_room(Short(1), torch.zeros(1)) == 1
    assert graphs.given_up and graphs.pool is None
    assert "without CUDA graphs" in caplog.text
    assert graphs.run(Short(0), [torch.zeros(1)], state=None) is None


def test_what_does_not_fit_then_either_is_an_error(graphs):
    short = Short(2)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        with_room(short, torch.zeros(1))
    assert short.calls == 2


def test_a_shortage_without_graphs_is_an_error_at_once(graphs):
    graphs.pool, short = None, Short(1)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        with_room(short, torch.zeros(1))
    assert short.calls == 1
