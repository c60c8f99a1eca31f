"""Reading weight files: shards, diffusers names, the host's quantised formats, and what cannot be read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from zimage_turbo.engine import formats, model, ode, sampling
from zimage_turbo.engine.checkpoint import Checkpoint, CheckpointError
from zimage_turbo.tests.comparison import relative_error
from zimage_turbo.tests.weights import MARKER, small_transformer

DIFFUSERS = {
    ".attention.out.": ".attention.to_out.0.",
    ".attention.q_norm.": ".attention.norm_q.",
    ".attention.k_norm.": ".attention.norm_k.",
    "x_embedder.": "all_x_embedder.2-1.",
    "final_layer.": "all_final_layer.2-1.",
}
FP8 = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)


@pytest.fixture(scope="module")
def single_file(tmp_path_factory):
    return small_transformer(tmp_path_factory.mktemp("single") / "small.safetensors")


def draw(path, precision="auto"):
    patcher = model.load_model(path, precision)
    positive = [[torch.randn(1, 20, 256, generator=torch.Generator().manual_seed(5)), {}]]
    return sampling.sample(patcher, positive, sampling.empty_latent(patcher, 128, 128, 1), 1, ode.sigmas(2))["samples"]


def diffusers_names(weights):
    renamed = {}
    for name, tensor in weights.items():
        for ours, theirs in DIFFUSERS.items():
            name = name.replace(ours, theirs)
        if ".attention.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".to_{part}.")] = rows.contiguous()
        else:
            renamed[name] = tensor
    return renamed


def linear_layers(weights):
    return [name.removesuffix(".weight") for name in weights if ".attention.qkv." in name or ".feed_forward.w" in name]


def test_sharded_diffusers_folder_is_the_single_file(single_file, tmp_path):
    weights = list(diffusers_names(load_file(single_file)).items())
    folder, index = tmp_path / "transformer", {}
    folder.mkdir()
    for number, start in enumerate(range(0, len(weights), 20), 1):
        shard = f"diffusion_pytorch_model-{number:05d}.safetensors"
        part = dict(weights[start : start + 20])
        save_file(part, folder / shard)
        index |= dict.fromkeys(part, shard)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text("{}")
    assert len(set(index.values())) > 2
    assert torch.equal(draw(folder), draw(single_file))


def holding(weights):
    norm = {"noise_refiner.0.attention.norm_q.weight": torch.ones(4)}
    return Checkpoint("file.safetensors", norm | weights, {}, {})


def test_row_scales_of_split_projections_are_stacked():
    parts = {}
    for number, part in enumerate("qkv"):
        layer = f"noise_refiner.0.attention.to_{part}"
        parts |= {f"{layer}.weight": torch.full((4, 4), number), f"{layer}.weight_scale": torch.rand(4, 1)}
        parts[f"{layer}.comfy_quant"] = MARKER
    joined = formats.with_comfy_names(holding(parts)).weights
    layer = "noise_refiner.0.attention.qkv"
    names = {f"{layer}.{part}" for part in ("weight", "weight_scale", "comfy_quant")}
    assert set(joined) == names | {"noise_refiner.0.attention.q_norm.weight"}
    expected = torch.cat([parts[f"noise_refiner.0.attention.to_{part}.weight_scale"] for part in "qkv"])
    assert torch.equal(joined[f"{layer}.weight_scale"], expected)
    assert joined[f"{layer}.weight"][:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_one_scale_for_a_split_matrix_is_refused():
    parts = {f"noise_refiner.0.attention.to_{part}.weight": torch.zeros(4, 4) for part in "qkv"}
    parts |= {f"noise_refiner.0.attention.to_{part}.weight_scale": torch.tensor(1.0) for part in "qkv"}
    with pytest.raises(CheckpointError, match=r"file\.safetensors.*one scale"):
        formats.with_comfy_names(holding(parts))


def fp8_file(single_file, path, old_style):
    """The small model with fp8 projections: the present format, or the older one with scaled_fp8 and scale_weight."""
    weights = load_file(single_file)
    for layer in linear_layers(weights):
        weight = weights[f"{layer}.weight"].float()
        scale = weight.abs().max() / 448
        weights[f"{layer}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        weights[f"{layer}.scale_weight" if old_style else f"{layer}.weight_scale"] = scale
        if not old_style:
            weights[f"{layer}.comfy_quant"] = FP8.clone()
    if old_style:
        weights["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(weights, path)
    return path


@pytest.mark.parametrize("old_style", [False, True], ids=["comfy_quant", "scaled_fp8"])
def test_fp8_scaled_file(single_file, tmp_path, old_style):
    file = fp8_file(single_file, tmp_path / "fp8.safetensors", old_style)
    expanded = draw(file, "fp32")
    assert relative_error(draw(file, "auto"), expanded) < 0.02
    assert 0 < relative_error(expanded, draw(single_file, "fp32")) < 0.1


def test_int8_is_multiplied_out_exactly(single_file, tmp_path):
    weights, products = load_file(single_file), load_file(single_file)
    for layer in linear_layers(weights):
        weight = weights[f"{layer}.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        values = (weight / scale).round().to(torch.int8)
        products[f"{layer}.weight"] = values.float() * scale
        weights |= {f"{layer}.weight": values, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": MARKER.clone()}
    save_file(weights, tmp_path / "int8.safetensors")
    save_file({name: value.float() for name, value in products.items()}, tmp_path / "products.safetensors")
    assert torch.equal(draw(tmp_path / "int8.safetensors", "fp32"), draw(tmp_path / "products.safetensors", "fp32"))


@pytest.mark.parametrize(
    "mark",
    [
        b'{"format": "nvfp4"}',
        b'{"format": "int8_tensorwise", "convrot": true}',
        b'{"format": "int8_tensorwise", "params": {"convrot": true}}',
    ],
)
def test_a_format_without_a_plain_product_is_not_multiplied_out(mark):
    marker = torch.tensor(list(mark), dtype=torch.uint8)
    weights = {"a.weight": torch.zeros(2, 2), "a.weight_scale": torch.ones(1), "a.comfy_quant": marker}
    with pytest.raises(CheckpointError, match=r"file\.safetensors.*precision to 'auto'"):
        formats.expanded(holding(weights), torch.float32)


def test_a_missing_weight_is_named(single_file, tmp_path):
    weights = load_file(single_file)
    del weights["layers.0.feed_forward.w2.weight"]
    save_file(weights, tmp_path / "incomplete.safetensors")
    with pytest.raises(CheckpointError, match=r"incomplete\.safetensors.*layers\.0\.feed_forward\.w2\.weight"):
        model.load_model(tmp_path / "incomplete.safetensors")


def test_a_wrong_shape_is_named(single_file, tmp_path):
    weights = load_file(single_file)
    weights["layers.0.attention.out.weight"] = torch.zeros(256, 128)
    save_file(weights, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"odd\.safetensors.*layers\.0\.attention\.out\.weight"):
        model.load_model(tmp_path / "odd.safetensors")


def test_row_scales_without_a_second_dimension_scale_rows():
    marker = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    weights = {
        "a.weight": torch.ones(2, 2, dtype=torch.int8),
        "a.weight_scale": torch.tensor([1.0, 2.0]),
        "a.comfy_quant": marker,
    }
    assert formats.expanded(holding(weights), torch.float32).weights["a.weight"].tolist() == [[1, 1], [2, 2]]


def test_metadata_that_names_prefixed_layers(single_file, tmp_path):
    """The newer form of a quantised whole checkpoint: marks in the metadata, keys behind a prefix."""
    weights = load_file(single_file)
    quantised, layers = {}, {}
    for layer in linear_layers(weights):
        weight = weights.pop(f"{layer}.weight").float()
        scale = weight.abs().max() / 448
        name = f"model.diffusion_model.{layer}"
        quantised |= {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}
        layers[name] = {"format": "float8_e4m3fn"}
    quantised |= {f"model.diffusion_model.{name}": value for name, value in weights.items()}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    save_file(quantised, tmp_path / "whole.safetensors", metadata=metadata)
    plain = fp8_file(single_file, tmp_path / "fp8.safetensors", old_style=False)
    assert torch.equal(draw(tmp_path / "whole.safetensors", "fp32"), draw(plain, "fp32"))


def test_prefixed_keys_of_a_whole_checkpoint(single_file, tmp_path):
    prefixed = {f"model.diffusion_model.{name}": value for name, value in load_file(single_file).items()}
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    assert torch.equal(draw(tmp_path / "prefixed.safetensors"), draw(single_file))
