"""What happens when GPU memory runs out while CUDA graphs hold some. On a GPU: tests/gpu/test_graphs.py."""

import types

import comfy.model_management as management
import pytest
import torch

from zimage_turbo.engine import forward, turbo
from zimage_turbo.engine.model import load_model
from zimage_turbo.engine.shortage import by_halves, spares_a_graph, with_room
from zimage_turbo.tests.comparison import relative_error
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
def patcher(tmp_path_factory):
    made = load_model(small_transformer(tmp_path_factory.mktemp("weights") / "small.safetensors", layers=1))
    management.load_models_gpu([made])
    yield made
    management.unload_model_and_clones(made)


@pytest.fixture
def graphs(patcher):
    """Those of a loaded model, which seem to hold memory on the CPU."""
    return patcher.model.diffusion_model.graphs


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


@pytest.mark.parametrize("pool", [(0, 1), None], ids=["graphs", "no-graphs"])
def test_the_second_attempt_is_the_frugal_one(graphs, pool):
    graphs.pool, short = pool, Short(1)
    assert with_room(short, torch.zeros(1), frugal=lambda x: x + 5) == 5
    assert short.calls == 1 and graphs.pool is None


def test_a_short_evaluation_computes_the_feed_forward_in_small_runs(patcher, monkeypatch):
    """What it gives is what one run gives; on the CPU nothing else differs."""
    module, rows, once = patcher.model.diffusion_model, [], forward.feed_forward_at_once
    request = torch.randn(1, 16, 16, 16), torch.tensor([0.5]), torch.randn(1, 21, 256), 21
    whole = module._forward(*request)
    short = Short(1)

    def denoise(module, compute, *inputs):
        return short(compute) if short.calls < 1 else real(module, compute, *inputs)

    def counted(module, y, *rest):
        rows.append(y.shape[1])
        return once(module, y, *rest)

    real = forward.denoise
    monkeypatch.setattr(forward, "denoise", denoise)
    monkeypatch.setattr(forward, "feed_forward_at_once", counted)
    monkeypatch.setattr(turbo, "ROWS_WHEN_SHORT", 32)
    assert relative_error(module._forward(*request), whole) < 2e-6
    assert max(rows) <= 32 < sum(rows)


class Room:
    """Adds one to rows where no more than so many come at once; notes how many came."""

    def __init__(self, most: int):
        self.most, self.seen = most, []

    def __call__(self, x, y):
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return x + y


@pytest.mark.parametrize(("most", "seen"), [(7, [7]), (4, [7, 4, 3]), (2, [7, 4, 2, 2, 3, 2, 1])])
def test_a_batch_that_does_not_fit_is_computed_in_parts(most, seen, caplog):
    x, room = torch.randn(7, 3), Room(most)
    assert torch.equal(by_halves(room, x, -x), torch.zeros(7, 3))
    assert room.seen == seen and caplog.text.count("in two parts") == sum(count > most for count in seen)


def test_one_row_that_does_not_fit_is_an_error():
    room = Room(0)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        by_halves(room, torch.zeros(4, 1), torch.zeros(4, 1))
    assert room.seen == [4, 2, 1]


def test_a_short_evaluation_of_a_batch_is_that_of_each_row(patcher, monkeypatch):
    module, real, seen = patcher.model.diffusion_model, forward.denoise, []
    request = torch.randn(3, 16, 16, 16), torch.tensor([0.5, 0.4, 0.3]), torch.randn(3, 21, 256), 21
    whole = module._forward(*request)

    def denoise(module, compute, x, *rest):
        seen.append(len(x))
        if len(x) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return real(module, compute, x, *rest)

    monkeypatch.setattr(forward, "denoise", denoise)
    assert relative_error(module._forward(*request), whole) < 2e-6
    assert seen == [3, 3, 2, 1, 1, 1]


@pytest.mark.parametrize(("free", "spares"), [(1, False), (3, True), (64, True)])
def test_graphs_are_captured_where_memory_is_to_spare(monkeypatch, free, spares):
    monkeypatch.setattr(management, "get_free_memory", lambda device: free * 2**30)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 2**29)
    assert spares_a_graph(CPU) is spares


def test_a_shortage_without_graphs_is_an_error_at_once(graphs):
    graphs.pool, short = None, Short(1)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        with_room(short, torch.zeros(1))
    assert short.calls == 1
