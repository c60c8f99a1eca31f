"""Diffusers folders that lack something or hold nonsense: named, with the remedy, and the server goes on."""

import json
import shutil
from dataclasses import dataclass

import pytest

from .answers import assert_clear, still_draws
from .damage import Write, altered, configured, diffusers_folder, removed, replaced, text, without
from .graphs import LOADER, turbo

INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
MODEL_FILE = "transformer/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
QUANTISED = "layers.1.feed_forward.w2"


@dataclass(frozen=True)
class BadFolder:
    name: str
    change: Write
    says: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


CASES = [
    *[
        BadFolder(f"lacks_{part}", removed(part), (f"no part '{part}'", "Download the whole folder again"))
        for part in ("transformer", "text_encoder", "vae")
    ],
    BadFolder("lacks_tokenizer", removed("tokenizer"), ("tokenizer/tokenizer.json", "Download the whole folder")),
    *[
        BadFolder(f"lacks_config_of_{part}", removed(f"{part}/config.json"), (f"{part}/config.json", "Download"))
        for part in ("transformer", "text_encoder", "vae")
    ],
    *[
        BadFolder(f"lacks_weights_of_{file.split('/')[0]}", removed(file), (file.split("/")[0], "Download"))
        for file in (MODEL_FILE, TEXT_FILE, VAE_FILE)
    ],
    BadFolder("config_is_cut", text("transformer/config.json", '{"dim":'), ("config.json' cannot be read", "again")),
    BadFolder("config_is_a_list", text("vae/config.json", "[]"), ("vae/config.json", "not a JSON object")),
    BadFolder("text_config_is_empty", text("text_encoder/config.json", "{}"), ("text_encoder", "hidden size 256")),
    BadFolder("index_is_cut", text(INDEX, "{"), ("index.json' cannot be read", "again")),
    BadFolder("index_is_a_list", text(INDEX, "[]"), ("not a shard index", "again")),
    BadFolder("index_without_map", text(INDEX, "{}"), ("not a shard index", "again")),
    BadFolder(
        "index_leads_outside",
        text(INDEX, json.dumps({"weight_map": {"x": "../../../secret.safetensors"}})),
        ("secret.safetensors' is not there",),
    ),
    BadFolder(
        "shard_is_missing",
        text(INDEX, json.dumps({"weight_map": {"x": "diffusion_pytorch_model-00002-of-00003.safetensors"}})),
        ("shard_is_missing/transformer", "00002-of-00003", "Download"),
    ),
    BadFolder("index_holds_numbers", text(INDEX, json.dumps({"weight_map": {"x": 5}})), ("not a shard index", "again")),
    BadFolder("tokenizer_is_cut", text("tokenizer/tokenizer.json", '{"a":'), ("tokenizer/tokenizer.json", "again")),
    BadFolder(
        "quantisation_is_a_list",
        configured("transformer", quantization_config=[]),
        ("transformer/config.json", "quantization_config"),
    ),
    BadFolder(
        "size_is_a_word", configured("transformer", sample_size="big"), ("transformer/config.json", "sample_size")
    ),
    BadFolder(
        "channels_are_a_word", configured("vae", block_out_channels="many"), ("vae/config.json", "block_out_channels")
    ),
    BadFolder(
        "text_width_differs",
        configured("text_encoder", hidden_size=512),
        ("text_width_differs/text_encoder", "hidden_size"),
    ),
    BadFolder("vae_levels_differ", configured("vae", block_out_channels=[64, 64]), ("vae_levels_differ/vae", "again")),
    BadFolder(
        "text_encoder_lacks_norm",
        replaced(TEXT_FILE, without("text_encoder", "model.layers.1.input_layernorm.weight")),
        ("text_encoder_lacks_norm/text_encoder", "model.layers.1.input_layernorm.weight", "again"),
    ),
    BadFolder(
        "text_encoder_lacks_weight",
        replaced(TEXT_FILE, without("text_encoder", "model.layers.1.self_attn.q_proj.weight")),
        ("text_encoder_lacks_weight/text_encoder", "model.layers.1.self_attn.q_proj", "again"),
    ),
    BadFolder(
        "vae_lacks_weight",
        replaced(VAE_FILE, without("vae", "decoder.conv_in.bias")),
        ("vae_lacks_weight/vae", "decoder.conv_in.bias", "again"),
    ),
    BadFolder(
        "quantised_columns_differ",
        replaced(MODEL_FILE, altered("diffusion_model", f"{QUANTISED}.weight", lambda weight: weight[:, :100])),
        ("quantised_columns_differ/transformer", QUANTISED, "100", "damaged"),
    ),
    BadFolder(
        "quantised_rows_differ",
        replaced(MODEL_FILE, altered("diffusion_model", f"{QUANTISED}.weight", lambda weight: weight[:100])),
        ("quantised_rows_differ/transformer", QUANTISED, "100", "damaged"),
    ),
]


@pytest.fixture
def diffusers(base):
    """The server's models/diffusers, empty again afterwards: 'auto' would take what lies there."""
    folder = base / "models" / "diffusers"
    yield folder
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_a_bad_folder_is_named_with_the_remedy(comfy, diffusers, case):
    diffusers_folder(diffusers / case.name)
    case.change(diffusers / case.name)
    result = await comfy.run(turbo(diffusion_model=f"diffusers/{case.name}", steps=1))
    shutil.rmtree(diffusers / case.name)
    await still_draws(comfy)
    assert result.status == "error", result.outputs
    assert result.error["node_type"] == "ZImageTurboLoader"
    assert_clear(result.error["exception_message"], case.says)


async def test_weights_of_nan_give_an_error_and_no_picture(comfy, diffusers):
    diffusers_folder(diffusers / "nan")
    poison = altered("diffusion_model", "cap_embedder.1.bias", lambda bias: bias * float("nan"))
    replaced(MODEL_FILE, poison)(diffusers / "nan")
    result = await comfy.run(turbo(diffusion_model="diffusers/nan", steps=1))
    assert not any("images" in output for output in result.outputs.values())
    assert result.error["node_type"] == "ZImageTurboSampler"
    assert_clear(result.error["exception_message"], ("NaN", "precision"))


async def test_a_good_folder_draws_in_its_own_size_and_auto_takes_it(comfy, diffusers):
    diffusers_folder(diffusers / "good-turbo")
    configured("transformer", sample_size=24)(diffusers / "good-turbo")
    for choice in ("diffusers/good-turbo", "auto"):
        (picture,) = await comfy.draw(turbo(diffusion_model=choice, steps=1, seed=30))
        assert picture.shape == (192, 192, 3)


@pytest.mark.parametrize(
    "index",
    [
        '{"_class_name": "FluxPipeline"}',
        '{"_class_name":',
        "[]",
        "{}",
        '{"_class_name": null}',
        '{"_class_name": ["pipeline", "AnotherPipeline"]}',
    ],
)
async def test_a_folder_of_another_pipeline_is_not_offered_and_harms_nothing(comfy, diffusers, index):
    diffusers_folder(diffusers / "other")
    (diffusers / "other" / "model_index.json").write_text(index, encoding="utf-8")
    status, offered = await comfy.answer("GET", "/object_info/ZImageTurboLoader")
    verdict = await comfy.offer(turbo(diffusion_model="diffusers/other"))
    drawn = await comfy.offer(turbo(seed=31, steps=1))
    (diffusers / "other" / "model_index.json").unlink()
    assert status == 200 and "diffusers/other" not in json.dumps(offered)
    assert verdict[0] == 400 and "diffusers/other" in json.dumps(verdict[1]["node_errors"][LOADER])
    assert drawn[0] == 200
    assert (await comfy.finish(drawn[1]["prompt_id"])).status == "success"
