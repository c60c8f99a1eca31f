"""Stock nodes on our MODEL, CLIP and VAE, and ours among stock ones, called as the executor calls them."""

import asyncio

import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_model_merging as merging
import comfy_extras.nodes_torch_compile as compiling
import folder_paths
import latent_preview
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import nodes
from zimage_turbo.engine import catalogue, formats, model, ode, sampling, text, turbo
from zimage_turbo.engine.checkpoint import Checkpoint
from zimage_turbo.nodes.loader import ZImageTurboLoader
from zimage_turbo.nodes.sampler import ZImageTurboSampler
from zimage_turbo.nodes.sigmas import ZImageTurboSigmas
from zimage_turbo.nodes.text_encoder import ZImageTurboTextEncode
from zimage_turbo.tests.comparison import relative_error
from zimage_turbo.tests.weights import small_transformer

PROMPT = "a large green square in the center, white background"
ROUNDING = 2e-5  # fp32, another order of summation in every layer of eight steps


@pytest.fixture(scope="module")
def positive(demo):
    with torch.inference_mode():
        return ZImageTurboTextEncode.execute(demo[1], PROMPT)[0]


def draw(patcher, positive, seed=5, **changes):
    settings = {"steps": 8, "denoise": 1.0, "width": 0, "height": 0, "batch_size": 1, "latent_image": None} | changes
    return ZImageTurboSampler.execute(patcher, positive, seed, **settings)[0]


def test_loader_node_gives_the_demo():
    patcher, clip, vae = ZImageTurboLoader.execute("demo", "auto", "auto", "auto", "auto").args
    assert type(patcher.model.diffusion_model) is turbo.TurboNextDiT
    assert text.hidden_size(clip) == model.caption_width(patcher)
    assert vae.latent_channels == 16


def test_lora_model_only(demo, positive, tmp_path):
    """A LoRA in diffusers' names gives what the same change made to the weights gives, and leaves no trace."""
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    edited = dict(formats.expanded(Checkpoint.read(catalogue.DEMO_FOLDER / "transformer"), torch.float32).weights)
    generator, lora = torch.Generator().manual_seed(1), {}
    for layer in [
        name.removesuffix(".weight") for name in edited if ".attention.to_" in name or ".feed_forward.w" in name
    ]:
        rows, columns = edited[f"{layer}.weight"].shape
        down, up = (torch.randn(shape, generator=generator) * 0.1 for shape in ((4, columns), (rows, 4)))
        lora[f"diffusion_model.{layer}.lora_A.weight"], lora[f"diffusion_model.{layer}.lora_B.weight"] = down, up
        edited[f"{layer}.weight"] = edited[f"{layer}.weight"] + 0.5 * up @ down
    save_file(lora, tmp_path / "demo_lora.safetensors")
    save_file(edited, tmp_path / "edited.safetensors")

    before = draw(demo[0], positive)["samples"]
    patched = nodes.LoraLoaderModelOnly().load_lora_model_only(demo[0], "demo_lora.safetensors", 0.5)[0]
    with_lora = draw(patched, positive)["samples"]
    merged = draw(model.load_model(tmp_path / "edited.safetensors"), positive, width=256, height=256)["samples"]
    assert relative_error(with_lora, before) > 0.01
    assert relative_error(with_lora, merged) <= ROUNDING
    assert torch.equal(draw(demo[0], positive)["samples"], before)


def test_stock_text_encode_on_our_clip(demo, positive):
    theirs = nodes.CLIPTextEncode().encode(demo[1], PROMPT)[0]
    assert torch.equal(theirs[0][0], positive[0][0])


def test_sampler_custom_advanced(demo, positive):
    levels, sampler = ZImageTurboSigmas.execute(8, 1.0).args
    guider = custom.BasicGuider.execute(demo[0], positive)[0]
    latent = sampling.empty_latent(demo[0], 0, 0, 1)
    theirs = custom.SamplerCustomAdvanced.execute(custom.Noise_RandomNoise(5), guider, sampler, levels, latent)[0]
    assert torch.equal(theirs["samples"], draw(demo[0], positive)["samples"])


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "res_multistep"])
def test_stock_ksampler(demo, positive, name):
    latent = sampling.empty_latent(demo[0], 0, 0, 1)
    theirs = nodes.KSampler().sample(demo[0], 5, 8, 1.0, name, "simple", positive, positive, latent)[0]["samples"]
    ours = draw(demo[0], positive)["samples"]
    assert relative_error(theirs, ours) <= (ROUNDING if name == "euler" else 0.5)


def test_stock_guidance_above_one(demo, positive):
    latent = sampling.empty_latent(demo[0], 0, 0, 1)
    negative = text.encode(demo[1], "a blue star")
    guided = nodes.KSampler().sample(demo[0], 5, 8, 2.0, "euler", "simple", positive, negative, latent)[0]["samples"]
    assert relative_error(guided, draw(demo[0], positive)["samples"]) > 0.01


def test_image_to_image_keeps_what_denoise_leaves(demo, positive):
    vae = demo[2]
    picture = nodes.VAEDecode().decode(vae, draw(demo[0], positive))[0]
    latent = nodes.VAEEncode().encode(vae, picture)[0]
    assert (nodes.VAEDecode().decode(vae, latent)[0] - picture).abs().mean() < 0.03
    assert torch.equal(draw(demo[0], positive, denoise=0.0, latent_image=latent)["samples"], latent["samples"])
    other = text.encode(demo[1], "a large green square in the center, black background")
    near, far = (draw(demo[0], other, seed=9, denoise=d, latent_image=latent)["samples"] for d in (0.2, 0.9))
    assert relative_error(near, latent["samples"]) < relative_error(far, latent["samples"])


def test_batch_rows_are_the_single_pictures_of_their_noise(demo, positive):
    batch = draw(demo[0], positive, batch_size=4)["samples"]
    assert batch.shape == (4, 16, 32, 32)
    assert relative_error(batch[:1], draw(demo[0], positive)["samples"]) <= ROUNDING
    assert all(relative_error(batch[row], batch[0]) > 0.01 for row in range(1, 4))


def test_previews_have_the_pictures_colours(demo, positive):
    latent_format = demo[0].get_model_object("latent_format")
    drawn = draw(demo[0], positive)
    previewer = latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors,
        latent_format.latent_rgb_factors_bias,
        latent_format.latent_rgb_factors_reshape,
    )
    seen = np.asarray(previewer.decode_latent_to_preview(latent_format.process_in(drawn["samples"]))) / 255
    picture = nodes.VAEDecode().decode(demo[2], drawn)[0][0].movedim(-1, 0)
    small = torch.nn.functional.avg_pool2d(picture, 8).movedim(0, -1).numpy()
    assert seen.shape == small.shape == (32, 32, 3)
    assert np.abs(seen - small).mean() < 0.06


@pytest.mark.parametrize(("width", "height"), [(192, 320), (384, 208)])
def test_not_square(demo, positive, width, height):
    latent = draw(demo[0], positive, width=width, height=height)
    assert latent["samples"].shape == (1, 16, height // 8, width // 8)
    assert nodes.VAEDecode().decode(demo[2], latent)[0].shape == (1, height, width, 3)


def test_torch_compile(demo, positive, tmp_path):
    patcher = model.load_model(small_transformer(tmp_path / "small.safetensors"))
    plain = draw(patcher, positive, steps=2, width=128, height=128)["samples"]
    compiled = compiling.TorchCompileModel.execute(patcher, "inductor")[0]
    assert relative_error(draw(compiled, positive, steps=2, width=128, height=128)["samples"], plain) <= 1e-4


def test_model_save_and_reload(demo, positive, tmp_path):
    folder_paths.set_output_directory(str(tmp_path))
    merging.ModelSave().save(demo[0], "saved")
    file = next(tmp_path.glob("saved*.safetensors"))
    assert any(key.endswith("attention.qkv.weight") for key in load_file(file))
    again = draw(model.load_model(file), positive, width=256, height=256)["samples"]
    assert relative_error(again, draw(demo[0], positive)["samples"]) <= ROUNDING


def test_deep_clone_is_reloaded_from_the_files(demo, positive):
    clone = demo[0].clone(force_deepcopy=True)
    assert clone.model is not demo[0].model
    assert type(clone.model.diffusion_model) is turbo.TurboNextDiT
    assert torch.equal(draw(clone, positive)["samples"], draw(demo[0], positive)["samples"])


def test_noise_mask_leaves_the_rest_alone(demo, positive):
    start = draw(demo[0], positive)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    painted = draw(demo[0], positive, seed=77, latent_image=start | {"noise_mask": mask})["samples"]
    kept = relative_error(painted[..., 16:], start["samples"][..., 16:])
    assert kept < 1e-3 < relative_error(painted[..., :16], start["samples"][..., :16])


def test_node_list_is_what_the_entry_point_gives():
    from zimage_turbo.nodes import NODES

    assert [node.define_schema().node_id for node in NODES] == [node.__name__ for node in NODES]
    assert ode.NFE == 8 and not any(asyncio.iscoroutinefunction(node.define_schema) for node in NODES)
