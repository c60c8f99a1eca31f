"""Values, prompts, latents and graphs that cannot work: refused or failed with the reason, and the server goes on."""

import pytest
import torch
from safetensors.torch import save_file

from . import graphs
from .answers import assert_clear, failed, refused, still_draws
from .graphs import LOADER, PROMPT, SAMPLER, turbo

REFUSED = [
    ("ZImageTurboLoader", "precision", "int3", ("'int3'", "auto", "bf16")),
    ("ZImageTurboLoader", "attention", "sage", ("'sage'", "auto", "cudnn")),
    ("ZImageTurboLoader", "precision", None, ("None", "auto", "bf16")),
    ("ZImageTurboLoader", "device", "cuda:7", ("'cuda:7'", "auto", "cpu")),
    ("ZImageTurboLoader", "device", "tpu", ("'tpu'", "auto", "cpu")),
    ("ZImageTurboLoader", "diffusion_model", "diffusers/../../main", ("'diffusers/../../main'", "auto")),
    ("ZImageTurboSampler", "width", -16, ("-16", "smaller than min of 0")),
    ("ZImageTurboSampler", "width", 99999, ("99999", "bigger than max of 4096")),
    ("ZImageTurboSampler", "height", "tall", ("tall", "INT")),
    ("ZImageTurboSampler", "batch_size", 0, ("0", "smaller than min of 1")),
    ("ZImageTurboSampler", "batch_size", 65, ("65", "bigger than max of 64")),
    ("ZImageTurboSampler", "steps", 0, ("0", "smaller than min of 1")),
    ("ZImageTurboSampler", "steps", 101, ("101", "bigger than max of 100")),
    ("ZImageTurboSampler", "solver", "rk45", ("rk45", "not in list")),
    ("ZImageTurboSampler", "tolerance", -0.1, ("-0.1", "smaller than min of 0")),
    ("ZImageTurboSampler", "denoise", 2, ("2.0", "bigger than max of 1.0")),
    ("ZImageTurboSampler", "denoise", "half", ("half", "FLOAT")),
    ("ZImageTurboSampler", "seed", -1, ("-1", "smaller than min of 0")),
    ("ZImageTurboSampler", "seed", 2**64, (str(2**64), f"bigger than max of {2**64 - 1}")),
    ("ZImageTurboSampler", "seed", None, ("None", "INT")),
]


@pytest.mark.parametrize(("node", "name", "value", "says"), REFUSED, ids=lambda part: str(part)[:30])
async def test_a_value_out_of_range_is_refused(comfy, node, name, value, says):
    reasons = await refused(comfy, turbo(**{name: value}))
    assert_clear(reasons[f"{node}.{name}"], (name, *says))


FAILED = [
    ("ZImageTurboLoader", {"precision": "fp8"}, ("precision 'fp8' cannot be used on cpu", "8.9", "Choose 'auto'")),
    ("ZImageTurboLoader", {"attention": "cudnn"}, ("attention 'cudnn'", "needs an NVIDIA GPU", "Choose 'auto'")),
    ("ZImageTurboSampler", {"width": 250}, ("width is 250", "multiples of 16", "Use 240 or 256")),
    ("ZImageTurboSampler", {"height": 8}, ("height is 8", "multiples of 16", "Use 16 or 32")),
    ("ZImageTurboTextEncode", {"text": ""}, ("text is empty", "Write what")),
    ("ZImageTurboTextEncode", {"text": " \n\t "}, ("text is empty", "Write what")),
    ("ZImageTurboTextEncode", {"text": "a red circle, " * 7200}, ("100,800 characters", "1,504", "Shorten it")),
    ("ZImageTurboTextEncode", {"text": "a red\x00 circle"}, ("text", "U+0000 at position 5", "Delete it")),
    ("ZImageTurboTextEncode", {"text": "a \x1b[31mred circle"}, ("text", "U+001B at position 2", "Delete it")),
    ("ZImageTurboTextEncode", {"text": "a \ud800 circle"}, ("text", "U+D800 at position 2", "Delete it")),
]


@pytest.mark.parametrize(("node", "inputs", "says"), FAILED, ids=lambda part: repr(part)[:30])
async def test_a_value_that_only_the_node_can_judge_is_its_error(comfy, node, inputs, says):
    result = await failed(comfy, turbo(**inputs))
    assert result.error["node_type"] == node
    assert_clear(result.error["exception_message"], says)


LATENTS = {
    "nan": (torch.full((1, 16, 32, 32), float("nan")), ("latent_image", "NaN", "VAE Encode")),
    "infinite": (torch.full((1, 16, 32, 32), float("inf")), ("latent_image", "infinite", "VAE Encode")),
    "four_channels": (torch.ones(1, 4, 32, 32), ("latent_image", "[1, 4, 32, 32]", "16", "loader's own VAE")),
    "video": (torch.ones(1, 16, 1, 32, 32), ("latent_image", "[1, 16, 1, 32, 32]", "loader's own VAE")),
    "no_pictures": (torch.ones(0, 16, 32, 32), ("latent_image", "[0, 16, 32, 32]")),
}


@pytest.mark.parametrize("name", LATENTS)
async def test_a_latent_that_the_model_cannot_take_is_named(comfy, base, name):
    latent, says = LATENTS[name]
    save_file({"latent_tensor": latent, "latent_format_version_0": torch.tensor([])}, base / "input" / f"{name}.latent")
    result = await failed(comfy, graphs.from_latent(f"{name}.latent"))
    assert result.error["node_type"] == "ZImageTurboSampler"
    assert_clear(result.error["exception_message"], says)


async def test_a_folder_that_cannot_be_written_is_named(comfy, base):
    taken = base / "output" / "taken"
    taken.parent.mkdir(exist_ok=True)
    taken.write_text("a file")
    result = await failed(comfy, turbo(seed=41, steps=1, width=64, height=64, filename_prefix="taken/sign"))
    taken.unlink()
    assert result.error["node_type"] == "ZImageTurboSaveImage"
    assert_clear(result.error["exception_message"], ("'taken/sign'", "Not a directory", "another prefix"))


async def test_an_unknown_input_is_ignored(comfy):
    graph = turbo(seed=40, steps=1, width=64, height=64)
    expected = await comfy.draw(graph)
    graph[SAMPLER]["inputs"] |= {"guidance": 7.5, "seed": 40, "width": 64.0}
    assert (await comfy.draw(graph) == expected).all()


@pytest.mark.parametrize("name", ["seed", "positive", "model"])
async def test_a_missing_input_is_named(comfy, name):
    graph = turbo()
    del graph[SAMPLER]["inputs"][name]
    reasons = await refused(comfy, graph)
    assert_clear(reasons[f"ZImageTurboSampler.{name}"], ("Required input is missing", name))


async def test_a_link_of_the_wrong_type_is_named(comfy):
    graph = turbo()
    graph[PROMPT]["inputs"]["clip"] = [LOADER, 0]
    reasons = await refused(comfy, graph)
    assert_clear(reasons["ZImageTurboTextEncode.clip"], ("clip", "MODEL", "CLIP"))


async def test_a_node_linked_to_itself_is_refused(comfy):
    graph = turbo()
    graph[SAMPLER]["inputs"]["latent_image"] = [SAMPLER, 0]
    (reason,) = (await refused(comfy, graph)).values()
    assert_clear(reason, ("cycle", "ZImageTurboSampler"))


async def test_an_unknown_node_type_is_named(comfy):
    graph = turbo()
    graph[SAMPLER]["class_type"] = "ZImageTurboSampler2"
    status, body = await comfy.offer(graph)
    await still_draws(comfy)
    assert status == 400
    assert body["error"]["type"] == "missing_node_type"
    assert body["error"]["extra_info"]["class_type"] == "ZImageTurboSampler2"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"prompt": 5}', b'{"prompt": {}}', b"\xff\xfe"])
async def test_a_body_that_is_no_prompt_does_not_stop_the_server(comfy, body):
    headers = {"Content-Type": "application/json"}
    status, _ = await comfy.answer("POST", "/prompt", data=body, headers=headers)
    assert status >= 400
    await still_draws(comfy)
