"""The demo checkpoint as a folder in diffusers layout: writing it and reading it back."""

import json
import pathlib

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from . import configs
from .autoencoder import Autoencoder
from .caption_encoder import CaptionEncoder
from .denoiser import Denoiser
from .int8 import pack, unpack

PARTS = {
    "transformer": (Denoiser, "diffusion_pytorch_model.safetensors"),
    "text_encoder": (CaptionEncoder, "model.safetensors"),
    "vae": (Autoencoder, "diffusion_pytorch_model.safetensors"),
}


def write_json(path: pathlib.Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_part(folder: pathlib.Path, name: str, module: nn.Module, config: dict) -> None:
    """Write one of PARTS. The weights are renamed into place, so that a reader never sees half a file."""
    write_json(folder / name / "config.json", config)
    path = folder / name / PARTS[name][1]
    partial = path.with_suffix(".partial")
    save_file(pack(module.state_dict()), partial)
    partial.replace(path)
    path.chmod(0o644)


def save_shell(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Everything of the folder that has no weights."""
    write_json(folder / "model_index.json", configs.MODEL_INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", configs.SCHEDULER)
    write_json(folder / "tokenizer" / "tokenizer_config.json", configs.TOKENIZER)
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))


def load_state(folder: pathlib.Path, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The config and the float32 state dict of one of PARTS."""
    config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
    return config, unpack(load_file(folder / name / PARTS[name][1]))


def load_part(folder: pathlib.Path, name: str) -> nn.Module:
    """One of PARTS in float32, ready to run on the CPU."""
    config, state = load_state(folder, name)
    module = PARTS[name][0](config)
    module.load_state_dict(state)
    return module.eval().requires_grad_(False)


def load_tokenizer(folder: pathlib.Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
