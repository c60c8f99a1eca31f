"""Our loader and sampler against the stock ones: the same latent for the same seed.

On a processor ComfyUI computes in fp32, where the fast forward differs from the host's in the order of operations only.
"""

import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import folder_paths
import pytest
import torch

import nodes
from zimage_turbo.engine import catalogue, formats, loading, model, ode, prompt_batch, sampling, text, turbo
from zimage_turbo.engine.checkpoint import Checkpoint, CheckpointError
from zimage_turbo.tests.comparison import relative_error, stock_sample
from zimage_turbo.tests.weights import full_size_text_encoder, full_size_transformer, small_transformer

FP32_ROUNDING = 1e-5  # eight steps through all layers
# The host's int8 product rounds activations too. One step of the 30-layer file below, by the host's own forward, is
# this far from the same weights multiplied out; another order of operations moves activations across rounding borders.
INT8_OWN_ERROR = 0.0246


def stock_demo(precision=torch.float32):
    """The demo in the host's own classes, built without our loader."""
    stored = formats.with_comfy_names(Checkpoint.read(catalogue.DEMO_FOLDER / "transformer"))
    weights = formats.expanded(stored, precision).weights
    config = comfy.supported_models.ZImage({
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "cap_feat_dim": 256, "n_layers": 8,
        "n_refiner_layers": 2, "qk_norm": True, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "time_scale": 1000.0, "z_image_modulation": True,
        "pad_tokens_multiple": 32,
        "ffn_dim_multiplier": weights["layers.0.feed_forward.w1.weight"].shape[0] / 256,
    })  # fmt: skip
    config.set_inference_dtype(precision, None)
    base = config.get_model(weights, "")
    base.load_model_weights(weights, "")
    device = torch.device("cpu")
    return comfy.model_patcher.CoreModelPatcher(base, load_device=device, offload_device=device)


@pytest.mark.parametrize(("width", "height", "batch"), [(256, 256, 1), (192, 320, 1), (208, 272, 3)])
def test_demo(demo, width, height, batch):
    patcher, clip, _ = demo
    positive = text.encode(clip, 'a red circle at the top, a white sign that says "AB" at the bottom')
    latent = sampling.empty_latent(patcher, width, height, batch)
    ours = sampling.sample(patcher, positive, latent, 7, ode.sigmas())["samples"]
    theirs = stock_sample(stock_demo(), positive, latent, 7)
    assert relative_error(ours, theirs) <= FP32_ROUNDING


def test_prompts_of_several_lengths(demo):
    """By a hook the host's model, too, draws each row as if it were alone; its own way would attend to the zeros."""
    patcher, clip, _ = demo
    lines = ("a blue star", "a large red circle at the top left, a small green square below it, on a wide yellow wall")
    positive = prompt_batch.gathered([text.encode(clip, line) for line in lines])
    latent = sampling.empty_latent(patcher, 208, 272, 2)
    ours = sampling.sample(patcher, positive, latent, 7, ode.sigmas())["samples"]
    assert relative_error(ours, stock_sample(stock_demo(), positive, latent, 7)) <= FP32_ROUNDING
    unhooked = [[states, prompt_batch.unhooked(extra)] for states, extra in positive]
    assert relative_error(ours, stock_sample(stock_demo(), unhooked, latent, 7)) > 0.01


def test_stock_samplers_take_our_model_and_ours_takes_a_stock_one(demo):
    patcher, clip, _ = demo
    positive = text.encode(clip, "a blue star")
    latent = sampling.empty_latent(patcher, 256, 256, 1)
    ours = sampling.sample(patcher, positive, latent, 3, ode.sigmas())["samples"]
    assert relative_error(stock_sample(patcher, positive, latent, 3), ours) <= FP32_ROUNDING
    stock_model = sampling.sample(stock_demo(), positive, latent, 3, ode.sigmas())["samples"]
    assert relative_error(stock_model, ours) <= FP32_ROUNDING


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in ("diffusion_models", "text_encoders"):
        (folder / kind).mkdir()
        folder_paths.add_model_folder_path(kind, str(folder / kind))
    return folder


@pytest.mark.parametrize(("layers", "quantised", "steps"), [(1, False, 2), (30, True, 1)], ids=["bf16-1", "int8-30"])
def test_full_size_file(models, layers, quantised, steps):
    file = full_size_transformer(models / "diffusion_models" / f"strided_{layers}_{quantised}.pt", layers, quantised)
    positive = [[torch.randn(1, 20, 2560, generator=torch.Generator().manual_seed(5)), {}]]
    patcher = model.load_model(file)
    assert type(patcher.model.diffusion_model) is turbo.TurboNextDiT
    assert model.caption_width(patcher) == 2560
    latent = sampling.empty_latent(patcher, 128, 160, 1)
    ours = sampling.sample(patcher, positive, latent, 11, ode.sigmas(steps))["samples"]
    del patcher
    theirs = stock_sample(nodes.UNETLoader().load_unet(file.name, "default")[0], positive, latent, 11, steps)
    assert relative_error(ours, theirs) <= (2 * INT8_OWN_ERROR if quantised else FP32_ROUNDING)


def test_full_size_text_encoder(models):
    file = full_size_text_encoder(models / "text_encoders" / "strided_qwen3_4b.pt")
    ours = text.encode(text.load_text_encoder(file, torch.device("cpu")), "火车 train")[0][0]
    stock = nodes.CLIPLoader().load_clip(file.name, "lumina2")[0]
    theirs = nodes.CLIPTextEncode().encode(stock, "火车 train")[0][0][0]
    assert ours.shape == theirs.shape and ours.shape[2] == text.FULL_WIDTH
    assert relative_error(ours, theirs.cpu()) <= FP32_ROUNDING


def test_models_that_do_not_fit_together_are_refused(models):
    file = full_size_transformer(models / "diffusion_models" / "wide.pt", 0, True)
    parts = catalogue.Parts(file, catalogue.DEMO_FOLDER / "text_encoder", catalogue.DEMO_FOLDER / "vae")
    with pytest.raises(CheckpointError, match="2560"):
        loading.load(parts, "auto", None)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_is_what_the_weights_are_held_in(tmp_path, precision):
    patcher = model.load_model(small_transformer(tmp_path / "small.safetensors"), precision)
    assert patcher.model.diffusion_model.layers[0].attention.qkv.weight.dtype == model.FLOATS[precision]
