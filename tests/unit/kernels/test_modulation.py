"""Small linears of many layers in one launch."""

import pytest
import torch

from zimage_turbo.kernels import modulation, modulation_triton, registry
from zimage_turbo.kernels.modulation import MODULATION, MOST_LAYERS, MOST_ROWS, ModulationRequest
from zimage_turbo.tests.unit.kernels.accuracy import error, normal, on_devices, poisoned, storable

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
sizes = on_devices(
    cpu=[(1, 1, 7, 5), (3, 2, 70, 36), (5, 8, 130, 64), (32, 1, 9, 256)], cuda=[(32, 1, 15360, 256), (34, 8, 999, 256)]
)  # L, B, N, K
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
held_types = pytest.mark.parametrize("held", DTYPES.values(), ids=[f"held-{name}" for name in DTYPES])


def arguments(size, device, dtype, held):
    layers, rows, width, columns = size
    x = normal(rows, columns + 3, device=device, dtype=dtype)[:, :columns]  # rows may lie apart
    weights = [normal(width, columns, device=device, dtype=held, spread=0.1) for _ in range(layers)]
    return x, weights, [normal(width, device=device, dtype=held) for _ in range(layers)]


def eager(x, weights, biases):
    return torch.stack([torch.nn.functional.linear(x, *one) for one in zip(weights, biases, strict=True)])


@sizes
@dtypes
@held_types
def test_products(device, size, dtype, held):
    """Each layer's own weights; at most twice the error of linears whose weights are cast to x's dtype first."""
    x, weights, biases = arguments(size, device, dtype, held)
    exact = eager(x.double(), [one.double() for one in weights], [one.double() for one in biases])
    cast = eager(x, [one.to(dtype) for one in weights], [one.to(dtype) for one in biases])
    y = poisoned((*size[:1], size[1], size[2]), storable(dtype, device), device)
    modulation_triton.products(x, weights, biases, y)
    for ours in (y, modulation.products(x, weights, biases, backend="torch")):
        assert error(ours, exact) <= max(2 * error(cast, exact), 5e-7)


@sizes
@pytest.mark.parametrize(("tile", "warps"), [(256, 1), (2048, 2), (32 * 256, 8)])
def test_other_tiles_write_each_output_once(device, size, tile, warps):
    given = arguments(size, device, torch.float32, torch.float32)
    y = poisoned((size[0], size[1], size[2]), torch.float32, device)
    modulation_triton.products(*given, y, tile, warps)
    assert error(y, modulation.products(*given, backend="torch")) < 1e-6


def test_a_replayed_graph_reads_the_weights_where_they_lie():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    x, weights, biases = arguments((32, 1, 512, 256), "cuda", torch.bfloat16, torch.bfloat16)
    modulation.products(x, weights, biases)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = modulation.products(x, weights, biases)
    for tensor in (x, *weights, *biases):  # in place, as a LoRA may be merged
        tensor.copy_(torch.randn_like(tensor))
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, modulation.products(x, weights, biases))


def test_written_where_asked():
    given = arguments((2, 3, 8, 4), "cpu", torch.float32, torch.float16)
    out = poisoned((2, 3, 8), torch.float32, "cpu")
    assert modulation.products(*given, out=out) is out and torch.isfinite(out).all()


def test_triton_is_for_few_rows_and_as_many_layers_as_a_launch_takes(monkeypatch):
    def chosen(rows, layers):
        return MODULATION.choose("auto", ModulationRequest(torch.device("cuda:0"), rows=rows, layers=layers)).name

    monkeypatch.setattr(registry, "installed", lambda package: True)
    monkeypatch.setattr(registry, "_capability", lambda index: (7, 5))
    assert chosen(MOST_ROWS, MOST_LAYERS) == "triton"
    assert chosen(MOST_ROWS + 1, 32) == chosen(1, MOST_LAYERS + 1) == "torch"
    refusals = MODULATION.refusals(ModulationRequest(torch.device("cpu"), rows=9, layers=32))
    assert refusals == {"triton": "takes at most 8 rows, got 9", "torch": None}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(4)}, r"x: expected floats \[B, K\] .* got \[4\]"),
        ({"x": torch.zeros(4, 2).T}, "x: expected .* unit stride"),
        ({"biases": [torch.zeros(8)]}, "expected as many of each, at least one, got 2 and 1"),
        ({"weights": [], "biases": []}, "expected as many of each, at least one, got 0 and 0"),
        ({"weights": [torch.zeros(8, 4), torch.zeros(8, 5)]}, r"weights\[1\]: expected a contiguous \[8, 4\]"),
        ({"weights": [torch.zeros(8, 4), torch.zeros(8, 4).half()]}, r"weights\[1\]: .* of one float type"),
        ({"weights": [torch.zeros(4, 8).T] * 2}, r"weights\[0\]: expected a contiguous"),
        ({"biases": [torch.zeros(8), torch.zeros(7)]}, r"biases\[1\]: expected a contiguous \[8\]"),
        ({"biases": [torch.zeros(8, dtype=torch.int8)] * 2}, r"biases\[0\]: .* got .* of int8"),
        ({"out": torch.zeros(2, 3, 7)}, r"out: expected a contiguous \[2, 3, 8\]"),
    ],
)
def test_refusals_name_what_was_given(change, complaint):
    given = {"x": torch.zeros(3, 4), "weights": [torch.zeros(8, 4)] * 2, "biases": [torch.zeros(8)] * 2}
    with pytest.raises(ValueError, match=complaint):
        modulation.products(**{**given, **change})
