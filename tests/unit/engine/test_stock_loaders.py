"""What the host's own loaders say to a file of ours, in a ComfyUI without the pack and in one that has it installed."""

import json
import subprocess
import sys

import pytest
import torch
from comfy.quant_ops import QuantizedTensor

from zimage_turbo.engine import formats, layouts, model, text
from zimage_turbo.engine.operations import mark
from zimage_turbo.nodes.loader import ZImageTurboLoader
from zimage_turbo.tests.weights import full_size_text_encoder, full_size_transformer

ASK = """
import asyncio, json, sys

comfyui, base, folder, pack = sys.argv[1:]
sys.path.insert(0, comfyui)
sys.argv[1:] = ["--cpu", "--base-directory", base]
import comfy.options
comfy.options.enable_args_parsing()
import folder_paths
import nodes

async def install():
    from server import PromptServer
    PromptServer(asyncio.get_running_loop())
    return await nodes.load_custom_node(pack)

if pack:
    assert asyncio.run(install())

def told(load, *given):
    try:
        load(*given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken"

for kind in ("diffusion_models", "text_encoders"):
    folder_paths.add_model_folder_path(kind, folder)
print(json.dumps({
    "int4": told(nodes.UNETLoader().load_unet, "int4.pt", "default"),
    "fp8": told(nodes.UNETLoader().load_unet, "fp8.pt", "default"),
    "text_encoder": told(nodes.CLIPLoader().load_clip, "text_encoder.pt", "lumina2"),
}))
"""
FORMS = {"int4": layouts.INT4, "fp8": layouts.FP8, "text_encoder": layouts.INT4}


def relabelled(path, form: str) -> None:
    """The quantised layers of a file in a form of ours: its names, shapes and types, over the same bytes."""
    weights = torch.load(path)
    for layer in [name.removesuffix(formats.MARKER) for name in weights if name.endswith(formats.MARKER)]:
        stored = weights[f"{layer}.weight"].view(torch.uint8)
        if form == layouts.INT4:
            weights[f"{layer}.weight"], weights[f"{layer}.weight_groups"] = stored[:, ::2], stored[:, ::16]
        else:
            weights[f"{layer}.weight"] = stored.view(torch.float8_e4m3fn)
        weights[f"{layer}.weight_scale"] = weights[f"{layer}.weight_scale"][:, 0].float()
        weights[f"{layer}{formats.MARKER}"] = mark(form)
    torch.save(weights, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    for name, form in FORMS.items():
        file = folder / f"{name}.pt"
        full_size_text_encoder(file) if name == "text_encoder" else full_size_transformer(file, 2, True)
        relabelled(file, form)
    return folder


def told(comfyui, base, folder, pack) -> dict:
    command = [sys.executable, "-c", ASK, *map(str, (comfyui, base, folder, pack))]
    done = subprocess.run(command, cwd=comfyui, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", FORMS)
def test_our_loader_reads_them(folder, name):
    file, device = folder / f"{name}.pt", torch.device("cpu")
    if name == "text_encoder":
        held = text.load_text_encoder(file, device).cond_stage_model.qwen3_4b.transformer.model.layers[0].mlp.up_proj
    else:
        held = model.load_model(file, "auto", device).model.diffusion_model.layers[0].feed_forward.w1
    assert held.quant_format == FORMS[name] and isinstance(held.weight, QuantizedTensor)


def test_without_the_pack_the_form_is_named(comfyui, folder, tmp_path):
    """The host shows no more of a file than that: it looks the form up before it reads anything else."""
    answers = told(comfyui, tmp_path, folder, "")
    assert answers == {name: f"KeyError: '{form}'" for name, form in FORMS.items()}


def test_with_the_pack_the_loader_is_named(comfyui, folder, tmp_path, pack):
    answers = told(comfyui, tmp_path, folder, pack)
    loader = ZImageTurboLoader.define_schema().display_name
    for name, form in FORMS.items():
        kind = form.removeprefix("zimage_").upper()
        assert answers[name] == (
            f"ValueError: This file holds weights in Z-Image-Turbo's {kind} form ({form}), which ComfyUI's own loaders "
            f"cannot read. Load it with the node '{loader}'."
        )
