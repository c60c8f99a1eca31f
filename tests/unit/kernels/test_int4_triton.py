"""The Triton forms of the INT4 format against the reference, which test_int4.py holds to the documented bits."""

from functools import partial

import pytest
import torch

from zimage_turbo.kernels import (
    int4,
    int4_expand_triton,
    int4_few_rows_triton,
    int4_lanes_triton,
    int4_quantise_triton,
    int4_reference,
    int4_tiles_triton,
)
from zimage_turbo.kernels.arguments import FP8
from zimage_turbo.tests.unit.kernels.accuracy import error, normal, on_devices, poisoned, storable

weights = on_devices(cpu=[(5, 272), (1, 16), (33, 256)], cuda=[(3840, 3840), (2560, 9728), (3840, 10240)])
products = on_devices(
    cpu=[(1, 70, 128), (3, 24, 384), (20, 24, 256)],
    cuda=[(1, 3840, 3840), (17, 11520, 3840), (64, 3840, 10240), (200, 2560, 9728)],
)


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


def check_product(product, device, size, dtype):
    """Within twice the error of torch's product in the same dtype; columns all differ, so that no order goes unseen.

    Rows of x are of any magnitude (in fp16 of one) and have an outlier. They count alike, and so do outputs.
    """
    rows, outputs, columns = size
    weight = random_weight(outputs, columns, device)
    x = normal(rows, columns, device=device, dtype=dtype)
    if dtype == torch.bfloat16:
        x *= torch.exp2(torch.randint(-60, 60, (rows, 1), device=device).float()).to(dtype)
    x[:, 5] *= 200
    bias = normal(outputs, device=device, dtype=dtype) if rows > 1 else None
    stored = int4.expand(weight, torch.float32)
    exact = x.double() @ stored.double().T
    if bias is not None:
        exact += bias.double()
    plain = torch.nn.functional.linear(x, stored.to(dtype), bias)
    out = poisoned((rows, outputs), storable(dtype, device), device)
    ours = product(x, weight.codes, weight.groups, weight.scales, bias, out)
    alike = (exact / weight.scales).norm(dim=1, keepdim=True) * weight.scales
    assert error(ours / alike, exact / alike) < 2 * error(plain / alike, exact / alike)


@products
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("warps", "slices"), [(4, 1), (2, 2)])
def test_linear_in_lanes(device, size, dtype, warps, slices):
    check_product(partial(int4_lanes_triton.linear, warps=warps, slices=slices), device, size, dtype)


@products
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("warps", "slices", "arranged"), [(4, 1, True), (8, 99, False)])
def test_linear_in_tiles(device, size, dtype, warps, slices, arranged):
    slices = min(slices, size[2] // 128)
    product = partial(int4_tiles_triton.linear, warps=warps, slices=slices, arranged=arranged)
    check_product(product, device, size, dtype)


@products
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_of_few_rows(device, size, dtype):
    check_product(int4_few_rows_triton.linear, device, size, dtype)


@pytest.mark.parametrize("rows", [1, 9, 17, 64, 100])
@pytest.mark.parametrize("columns", [128, 256, 2560, 3840, 10240])
@pytest.mark.parametrize("outputs", [1, 1024, 3840, 11520])
def test_launch_shapes_cover_the_product(rows, outputs, columns):
    """A warp has columns to work on, and no slice is empty, on a small GPU and on a large one."""
    for multiprocessors in (40, 132):
        lanes = int4_few_rows_triton.lanes_shape(outputs, columns, multiprocessors)
        assert lanes["warps"] in (1, 2, 4) and 1 <= lanes["warps"] * lanes["slices"] <= 2 * (columns // 128)
        tiles = int4_few_rows_triton.tiles_shape(rows, outputs, columns, multiprocessors)
        assert tiles["warps"] in (4, 8) and 1 <= tiles["slices"] <= columns // 128


@on_devices(cpu=[(2, 40, 128)], cuda=[(2, 3840, 3840), (64, 3840, 3840)])
def test_takes_rows_at_any_address(device, size):
    rows, outputs, columns = size
    weight = random_weight(outputs, columns, device)
    x = normal(rows * columns + 1, device=device, dtype=torch.bfloat16)[1:].view(rows, columns)
    parts = weight.codes, weight.groups, weight.scales
    assert x.data_ptr() % 16 and torch.equal(
        int4_few_rows_triton.linear(x, *parts, None), int4_few_rows_triton.linear(x.clone(), *parts, None)
    )


@on_devices(cpu=[], cuda=[(16, 128)])
def test_refuses_weights_that_lie_askew(device, size):
    weight = random_weight(*size, device)
    codes = torch.empty(weight.codes.numel() + 8, dtype=torch.uint8, device=device)[8:].view(weight.codes.shape)
    with pytest.raises(ValueError, match="multiple of 16"):
        int4.Int4Weight(codes, weight.groups, weight.scales, rotated=False)


@on_devices(cpu=[], cuda=[(1, 2560, 3840), (16, 3840, 2560), (64, 2560, 9728)])
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


@on_devices(cpu=[], cuda=[(1, 2560), (16, 2560), (64, 2560)])
def test_products_that_follow_each_other(device, size):
    """Each reads what the one before it wrote, though it may start while that one still runs."""
    chain = [int4.quantise(normal(size[1], size[1], device=device, spread=0.02), rotate=False) for _ in range(6)]
    x = normal(*size, device=device, dtype=torch.bfloat16)
    expected = x
    for weight in chain:
        expected = int4.linear(expected, weight)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = x
        for weight in chain:
            found = int4.linear(found, weight)
    for _ in range(20):
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(found, expected)


@on_devices(cpu=[], cuda=[(1, 2560), (16, 2560), (64, 2560)])
def test_weight_written_right_before(device, size):
    """A product that starts while the kernel that writes its groups still runs does not read them before."""
    weight = int4.quantise(normal(size[1], size[1], device=device, spread=0.02), rotate=False)
    written = int4.Int4Weight(weight.codes.clone(), weight.groups.clone(), weight.scales, rotated=False)
    x = normal(*size, device=device, dtype=torch.bfloat16)
    expected = int4.linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.add(weight.codes, 0, out=written.codes)
        torch.add(weight.groups, 0, out=written.groups)
        found = int4.linear(x, written)
    for _ in range(20):
        for part in (written.codes, written.groups, found):
            part.zero_()
        graph.replay()
        assert torch.equal(found, expected)


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
