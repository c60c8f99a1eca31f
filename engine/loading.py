"""The three models of Z-Image-Turbo, loaded together and held against each other."""

import logging
import time
from pathlib import Path

import folder_paths
import torch

from . import progress
from .catalogue import Parts
from .checkpoint import CheckpointError
from .model import caption_width, load_model
from .text import hidden_size, load_text_encoder
from .vae import load_vae


def load(
    parts: Parts, precision: str, device: torch.device | None, attention: str = "auto", cache: bool = False
) -> tuple:
    """MODEL, CLIP and VAE; `load_model` explains the arguments.

    Raises CheckpointError, also when two of them do not fit together.
    """
    logging.info("Z-Image-Turbo: loading %s, %s and %s.", parts.diffusion_model, parts.text_encoder, parts.vae)
    start = time.monotonic()
    _tell_reading("diffusion model", parts.diffusion_model)
    patcher = load_model(parts.diffusion_model, precision, device, attention, cache)
    embeddings = folder_paths.get_folder_paths("embeddings")
    _tell_reading("text encoder", parts.text_encoder)
    clip = load_text_encoder(parts.text_encoder, device, embeddings, precision, cache, patcher.model_size())
    if hidden_size(clip) != caption_width(patcher):
        raise CheckpointError(
            f"text_encoder '{parts.text_encoder.name}' gives {hidden_size(clip)} values a token, the diffusion model "
            f"'{parts.diffusion_model.name}' takes {caption_width(patcher)}. Set text_encoder to 'auto'."
        )
    _tell_reading("VAE", parts.vae)
    vae = load_vae(parts.vae, device)
    progress.tell(f"loaded in {time.monotonic() - start:.1f} s")
    return patcher, clip, vae


def _tell_reading(model: str, path: Path) -> None:
    """On the node alone: the log has all three in its first line."""
    progress.show(f"reading the {model} {path.parent.name}/{path.name}")
