"""Modulation of all blocks in one product, and layer by layer where something stands between."""

import pytest
import torch

from zimage_turbo.engine import modulation
from zimage_turbo.engine.model import load_model
from zimage_turbo.tests.comparison import relative_error
from zimage_turbo.tests.weights import small_transformer


@pytest.fixture
def blocks(tmp_path):
    module = load_model(small_transformer(tmp_path / "small.safetensors", layers=3), "fp32").model.diffusion_model
    return [*module.noise_refiner, *module.layers]


@pytest.fixture
def products(monkeypatch):
    """How many layers each product took."""
    real, taken = modulation.modulation.products, []

    def counted(time, weights, biases):
        taken.append(len(weights))
        return real(time, weights, biases)

    monkeypatch.setattr(modulation.modulation, "products", counted)
    return taken


def layer_by_layer(blocks, time):
    return [block.adaLN_modulation(time).chunk(4, -1) for block in blocks]


def same(ours, theirs) -> bool:
    pairs = [pair for block in zip(ours, theirs, strict=True) for pair in zip(*block, strict=True)]
    assert len(pairs) == 4 * len(ours)
    return all(relative_error(*pair) < 1e-6 for pair in pairs)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_all_blocks_in_one_product(blocks, products, rows):
    time = torch.randn(rows, 256)
    assert same(modulation.modulations(blocks, time), layer_by_layer(blocks, time))
    assert products == [5]


def test_weights_of_another_float_type_than_the_embedding(blocks, products):
    for block in blocks:
        held_as(torch.bfloat16)(block.adaLN_modulation[0])
    time = torch.randn(1, 256)
    assert same(modulation.modulations(blocks, time), layer_by_layer(blocks, time))
    assert products == [5]


def test_without_a_noise_level_there_is_none(blocks, products):
    assert modulation.modulations(blocks[:2], None) == [(None,) * 4] * 2
    assert not products


def doubled(linear):
    linear.weight_function = [lambda weight: 2 * weight]


def doubled_bias(linear):
    linear.bias_function = [lambda bias: 2 * bias]


def bypassed(linear):
    linear.forward = lambda x: 2 * type(linear).forward(linear, x)


def hooked(linear):
    linear.register_forward_hook(lambda _, given, result: 2 * result)


def held_as(dtype):
    def hold(linear):
        linear.weight = torch.nn.Parameter(linear.weight.to(dtype), requires_grad=False)
        linear.comfy_cast_weights = True  # to what the layer is given

    return hold


def strided(linear):
    linear.weight = torch.nn.Parameter(linear.weight.T.contiguous().T, requires_grad=False)


CHANGES = {
    "weight function": doubled, "bias function": doubled_bias, "bypass LoRA": bypassed, "hook": hooked,
    "float8": held_as(torch.float8_e4m3fn), "another type than the others": held_as(torch.bfloat16), "strided": strided,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_one_layer_that_is_not_plain_is_asked_itself_and_so_are_all(blocks, products, change):
    time = torch.randn(1, 256)
    before = layer_by_layer(blocks, time)
    change(blocks[3].adaLN_modulation[0])
    ours = modulation.modulations(blocks, time)
    assert not products
    assert same(ours, layer_by_layer(blocks, time))
    assert same([*ours[:3], ours[4]], [*before[:3], before[4]])
    if change in (doubled, doubled_bias, bypassed, hooked):
        assert not same(ours[3:4], before[3:4])


def test_a_hook_of_the_whole_layer_is_called(blocks, products):
    blocks[0].adaLN_modulation.register_forward_hook(lambda _, given, result: 0 * result)
    assert not modulation.modulations(blocks, torch.randn(1, 256))[0][0].any()
    assert not products


def test_a_merged_lora_is_seen(blocks, products):
    time, linear = torch.randn(1, 256), blocks[1].adaLN_modulation[0]
    before = modulation.modulations(blocks, time)
    linear.weight.add_(torch.randn_like(linear.weight))
    in_place = modulation.modulations(blocks, time)
    linear.weight = torch.nn.Parameter(torch.randn_like(linear.weight), requires_grad=False)
    elsewhere = modulation.modulations(blocks, time)
    assert products == [5, 5, 5]
    assert not same(in_place[1:2], before[1:2]) and not same(elsewhere[1:2], in_place[1:2])
    assert same(elsewhere, layer_by_layer(blocks, time))


def test_weights_elsewhere_come_along_by_the_layer(blocks):
    """As the host offloads: the layers cast their weights where they are called."""
    layers = [block.adaLN_modulation for block in blocks]
    assert modulation.plain(layers, torch.device("cpu"))
    assert not modulation.plain(layers, torch.device("cuda:0"))
