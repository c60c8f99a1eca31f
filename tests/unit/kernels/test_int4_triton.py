"""The Triton forms of the INT4 format against the reference, which test_int4.py holds to the documented bits."""

import pytest
import torch

from zimage_turbo.kernels import (
    int4,
    int4_expand_triton,
    int4_few_rows_triton,
    int4_linear_triton,
    int4_quantise_triton,
    int4_reference,
)
from zimage_turbo.kernels.arguments import FP8
from zimage_turbo.kernels.int4_shapes import levels
from zimage_turbo.tests.unit.kernels.accuracy import error, normal, on_devices, poisoned, storable

weights = on_devices(cpu=[(5, 272), (1, 16), (33, 256)], cuda=[(3840, 3840), (2560, 9728), (3840, 10240)])
products = on_devices(
    cpu=[(1, 70, 128), (3, 64, 640), (20, 100, 256), (70, 40, 128)],
    cuda=[(1, 3840, 3840), (17, 11520, 3840), (64, 3840, 10240), (200, 2560, 9728)],
)


SHAPES = [{"overlap": True}, {"warps": 8, "unroll": 1}, {"tiles": 2, "programs": 999}]


def random_weight(rows, columns, device):
    """Any bytes at all: every code, shape and drop."""
    return int4.Int4Weight(
        torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=device),
        torch.randint(256, (rows, columns // 16), dtype=torch.uint8, device=device),
        torch.exp2(torch.randint(-12, -4, (rows,), device=device).float()),
        rotated=False,
    )


@weights
@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16, torch.float16])
def test_expand_is_bit_exact(device, size, dtype):
    weight = random_weight(*size, device)
    parts = weight.codes, weight.groups, weight.scales
    ours = int4_expand_triton.expand(*parts, poisoned(size, dtype, device))
    expected = int4_reference.expand(*parts, poisoned(size, dtype, device))
    assert torch.equal(ours.float(), expected.float())


@products
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("warps", [4, 8])
def test_linear(device, size, dtype, warps):
    """Within twice the error of torch's product in the same dtype; columns all differ, so that no order goes unseen."""
    rows, outputs, columns = size
    weight = random_weight(outputs, columns, device)
    x = normal(rows, columns, device=device, dtype=dtype)
    bias = normal(outputs, device=device, dtype=dtype) if rows > 1 else None
    exact = x.double() @ int4.expand(weight, torch.float32).double().T
    if bias is not None:
        exact += bias.double()
    plain = torch.nn.functional.linear(x, int4.expand(weight, torch.float32).to(dtype), bias)
    out = poisoned((rows, outputs), storable(dtype, device), device)
    ours = int4_linear_triton.linear(x, weight.codes, weight.groups, weight.scales, bias, out, warps=warps)
    assert error(ours, exact) < 2 * error(plain, exact)


@products
@pytest.mark.parametrize("candidate", ["load", "shuffle"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_in_two_terms(device, size, candidate, shape):
    """As test_linear: the terms hold all that bf16 does."""
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the FP8 product in registers is Hopper's")
    rows, outputs, columns = size
    weight = random_weight(outputs, columns, device)
    x = normal(rows, columns, device=device, dtype=torch.bfloat16)
    x *= torch.exp2(torch.randint(-60, 60, (rows, 1), device=device).float()).to(x.dtype)
    x[:, 5] *= 200
    bias = normal(outputs, device=device, dtype=torch.bfloat16) if rows > 1 else None
    exact = x.double() @ int4.expand(weight, torch.float32).double().T
    if bias is not None:
        exact += bias.double()
    plain = torch.nn.functional.linear(x, int4.expand(weight, torch.bfloat16), bias)
    out = poisoned((rows, outputs), storable(torch.bfloat16, device), device)
    parts = weight.codes, weight.groups, weight.scales
    ours = int4_few_rows_triton.linear(x, *parts, bias, out, candidate, **shape)
    for row in range(rows):
        assert error(ours[row], exact[row]) <= 2 * error(plain[row], exact[row])  # both 0 where only the bias is left


def test_signs_of_the_outer_levels():
    """What int4_decode_triton.shuffle_row builds upon."""
    value = levels(torch.device("cpu"))
    assert (value[:, :4] < 0).all() and (value[:, 12:] > 0).all()


@on_devices(cpu=[], cuda=[(16, 3840, 2560), (64, 2560, 9728)])
@pytest.mark.parametrize("product", [int4.linear, int4.linear_fp8])
def test_graph_replays_with_new_activations(device, size, product):
    rows, outputs, columns = size
    weight = int4.quantise(normal(outputs, columns, device=device, spread=0.02))
    x = normal(rows, columns, device=device, dtype=torch.bfloat16)
    product(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product(x, weight)
    x.copy_(normal(rows, columns, device=device))
    graph.replay()
    assert torch.equal(captured, product(x, weight))


@weights
def test_search_finds_as_good_codes(device, size):
    weight = normal(*size, device=device)
    weight[0, :16] = 0
    ours = int4.Int4Weight(*int4_quantise_triton.search(weight, 0), rotated=False)
    theirs = int4.Int4Weight(*int4_reference.search(weight, 0), rotated=False)
    assert torch.equal(ours.scales, theirs.scales)
    if size == (1, 16):
        assert (int4.dequantise(ours, torch.float32) == 0).all()
    else:
        assert int4.relative_error(weight, ours) < 1.001 * int4.relative_error(weight, theirs)


@on_devices(cpu=[(4, 256)], cuda=[(256, 3840)])
def test_stochastic_search_keeps_the_mean(device, size):
    weight = normal(*size, device=device)
    seeds = range(1, 9)
    found = [int4.Int4Weight(*int4_quantise_triton.search(weight, seed), rotated=False) for seed in seeds]
    values = [int4.dequantise(each, torch.float32) for each in found]
    nearest = int4.Int4Weight(*int4_quantise_triton.search(weight, 0), rotated=False)
    assert torch.equal(found[0].groups, nearest.groups)
    assert error(sum(values) / len(values), weight) < 0.75 * int4.relative_error(weight, nearest)
    assert error(values[0], weight) > 1.2 * int4.relative_error(weight, nearest)
