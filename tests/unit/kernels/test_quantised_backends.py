"""The backends of INT4, FP8 and Hadamard ops: who refuses what and why, and a backend of a user's own."""

from dataclasses import replace

import pytest
import torch

from zimage_turbo.kernels import fp8, hadamard, int4, registry
from zimage_turbo.kernels.arguments import FP8
from zimage_turbo.kernels.registry import Request, no_refusal, product_request, weight_request
from zimage_turbo.tests.unit.kernels import accuracy
from zimage_turbo.tests.unit.kernels.accuracy import dequantised

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
BF16 = torch.bfloat16
NO_GPU = "needs an NVIDIA GPU, the tensors are on cpu"
NO_FP8 = "FP8 products need an NVIDIA GPU of compute capability 8.9 or newer; the device is cpu"
ON_CPU = [
    (int4.INT4_SEARCH, Request(CPU), {"triton": NO_GPU, "torch": None}),
    (int4.INT4_EXPAND, weight_request(CPU, FP8, 16, 256), {"triton": NO_GPU, "torch": None}),
    (int4.INT4_LINEAR, product_request(CPU, BF16, 1, 16, 256), {"fused": NO_GPU, "expanded": None}),
    (fp8.QUANTISE_ROWS, Request(CPU, quantise=True), {"triton": NO_GPU, "torch": None}),
    (fp8.FP8_LINEAR, product_request(CPU, BF16, 1, 16, 256), {"scaled_mm": NO_FP8, "torch": None}),
    (fp8.FP8_PRODUCT, product_request(CPU, BF16, 1, 16, 256), {"scaled_mm": NO_FP8, "torch": None}),
    (hadamard.HADAMARD, Request(CPU), {"torch": None}),
    (hadamard.HADAMARD_QUANTISE_ROWS, Request(CPU, quantise=True), {"triton": NO_GPU, "torch": None}),
]


@pytest.mark.parametrize(("op", "request_", "reasons"), ON_CPU, ids=[op.op for op, *_ in ON_CPU])
def test_backends_of_quantised_weights_on_the_cpu(op, request_, reasons):
    """In order of preference."""
    assert list(op.refusals(request_).items()) == list(reasons.items())


def on_gpu(monkeypatch, capability, triton=True):
    """Answers as a GPU's; no GPU is needed to ask who would refuse it."""
    monkeypatch.setattr(registry, "installed", lambda package: triton)
    monkeypatch.setattr(registry, "_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


# Sizes of products are rows, outputs, columns; those of an expansion outputs, columns.
ON_GPU = [
    (int4.INT4_LINEAR, (8, 0), (BF16, 64, 16, 256), None),
    (int4.INT4_LINEAR, (8, 0), (BF16, 65, 16, 256), "takes 1 to 64 rows, got 65"),
    (int4.INT4_LINEAR, (8, 0), (BF16, 0, 16, 256), "takes 1 to 64 rows, got 0"),
    (int4.INT4_LINEAR, (8, 0), (torch.float32, 1, 16, 256), "takes bfloat16 and float16, got float32"),
    (int4.INT4_LINEAR, (8, 0), (BF16, 1, 16, 272), "takes a K that is a multiple of 128, got K = 272"),
    (
        int4.INT4_LINEAR,
        (7, 5),
        (torch.float16, 1, 16, 256),
        "needs a GPU of compute capability 8.0 or newer, this one has 7.5",
    ),
    (int4.INT4_EXPAND, (7, 5), (FP8, 16, 256), None),
    (int4.INT4_EXPAND, (9, 0), (torch.float32, 16, 256), "gives float8_e4m3fn, bfloat16 and float16, got float32"),
    (fp8.FP8_LINEAR, (8, 9), (BF16, 3, 16, 272), None),
    (
        fp8.FP8_LINEAR,
        (9, 0),
        (BF16, 3, 24, 256),
        "FP8 tensor cores need K and N that are multiples of 16, got K = 256, N = 24",
    ),
    (
        fp8.FP8_LINEAR,
        (8, 6),
        (BF16, 3, 16, 256),
        "FP8 products need an NVIDIA GPU of compute capability 8.9 or newer (GeForce RTX 40, L40, H100); a GPU has 8.6",
    ),
]


@pytest.mark.parametrize(("op", "capability", "given", "reason"), ON_GPU)
def test_backends_of_quantised_weights_on_a_gpu(monkeypatch, op, capability, given, reason):
    """The first runs or says why not, and then "auto" takes the second."""
    on_gpu(monkeypatch, capability)
    asked = (weight_request if op is int4.INT4_EXPAND else product_request)(GPU, *given)
    first, second = op.backends
    assert op.refusals(asked) == {first: reason, second: None}
    assert op.choose("auto", asked).name == (second if reason else first)


def test_without_triton_int4_is_expanded_by_torch(monkeypatch):
    on_gpu(monkeypatch, (9, 0), triton=False)
    assert int4.INT4_SEARCH.choose("auto", Request(GPU)).name == "torch"
    assert int4.INT4_EXPAND.choose("auto", weight_request(GPU, FP8, 16, 256)).name == "torch"
    assert int4.INT4_LINEAR.choose("auto", product_request(GPU, BF16, 1, 16, 256)).name == "expanded"


def quantised():
    return int4.Int4Weight(
        torch.randint(256, (16, 128), dtype=torch.uint8),
        torch.randint(256, (16, 16), dtype=torch.uint8),
        torch.ones(16),
        rotated=False,
    )


def rows_in_fp8():
    return torch.ones(16, 256).to(FP8), torch.ones(16, 1)


CALLS = [
    (int4.INT4_SEARCH, lambda **by: int4.quantise(torch.ones(16, 256), rotate=False, **by)),
    (int4.INT4_SEARCH, lambda **by: int4.quantise(torch.ones(16, 256), **by)),
    (int4.INT4_EXPAND, lambda **by: int4.expand(quantised(), BF16, **by)),
    (int4.INT4_LINEAR, lambda **by: int4.linear(torch.ones(2, 3, 256), quantised(), **by)),
    (fp8.QUANTISE_ROWS, lambda **by: fp8.quantise_rows(torch.ones(2, 256), **by)),
    (fp8.FP8_LINEAR, lambda **by: fp8.linear(*rows_in_fp8(), rows_in_fp8()[0], torch.ones(16), None, BF16, **by)),
    (fp8.FP8_PRODUCT, lambda **by: fp8.product(rows_in_fp8()[0], rows_in_fp8()[0], **by)),
    (hadamard.HADAMARD, lambda **by: hadamard.rotate(torch.ones(2, 3, 256), **by)),
    (hadamard.HADAMARD_QUANTISE_ROWS, lambda **by: hadamard.rotate_quantise_rows(torch.ones(2, 256), **by)),
]


@pytest.mark.parametrize("preferred", [False, True], ids=["by name", "preferred"])
@pytest.mark.parametrize(("op", "call"), CALLS, ids=[op.op for op, _ in CALLS])
def test_a_backend_of_a_users_own(monkeypatch, op, call, preferred):
    """It gets what the op's own reference gets, by its name and, if it is preferred and does not refuse, by "auto"."""
    monkeypatch.setattr(op, "backends", dict(op.backends))
    reference, taken, refused = list(op.backends.values())[-1].function, [], []

    def mine(*given):
        taken.append(given)
        return reference(*given)

    op.register("mine", mine, lambda request: refused[0] if refused else None, preferred=preferred)
    call(backend="mine")
    assert taken
    taken.clear()
    call()
    assert bool(taken) == preferred
    taken.clear()
    refused.append("it is Sunday")
    call()
    assert not taken
    with pytest.raises(ValueError, match=f"{op.op}: backend 'mine' cannot run this(.|\n)*mine: it is Sunday"):
        call(backend="mine")


TRITON_CALLS = [
    (
        int4.INT4_SEARCH,
        lambda weight, by: int4.dequantise(int4.quantise(torch.eye(16, 256), backend=by), torch.float32),
    ),
    (int4.INT4_EXPAND, lambda weight, by: int4.expand(weight, torch.float16, backend=by)),
    (int4.INT4_LINEAR, lambda weight, by: int4.linear(torch.eye(3, 256, dtype=torch.float16), weight, backend=by)),
    (fp8.QUANTISE_ROWS, lambda weight, by: dequantised(*fp8.quantise_rows(torch.eye(3, 256), backend=by))),
    (
        hadamard.HADAMARD_QUANTISE_ROWS,
        lambda weight, by: dequantised(*hadamard.rotate_quantise_rows(torch.eye(3, 256), backend=by)),
    ),
]


@pytest.mark.skipif(accuracy.GPU, reason="Triton's interpreter is for machines without an NVIDIA GPU")
@pytest.mark.parametrize(("op", "call"), TRITON_CALLS, ids=[op.op for op, _ in TRITON_CALLS])
def test_triton_backends_take_what_the_op_gives(monkeypatch, op, call):
    """Chosen by name; what the kernels compute is tested elsewhere."""
    first, second = op.backends.values()
    monkeypatch.setattr(op, "backends", {**op.backends, first.name: replace(first, refusal=no_refusal)})
    weight = quantised()
    assert accuracy.error(call(weight, first.name), call(weight, second.name)) < 1e-3


def test_an_int4_product_is_made_of_ops_with_backends(monkeypatch):
    """A user's expansion serves products of many rows, and in FP8."""
    monkeypatch.setattr(int4.INT4_EXPAND, "backends", dict(int4.INT4_EXPAND.backends))

    def zeros(codes, groups, scales, out):
        out.zero_()

    weight, x = quantised(), torch.ones(3, 256)
    int4.INT4_EXPAND.register("zeros", zeros, no_refusal, preferred=True)
    assert not int4.linear(x, weight).any() and not int4.linear_fp8(x, weight).any()
