"""The three models of Z-Image-Turbo, loaded together and held against each other."""

import logging

import folder_paths
import torch

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
    patcher = load_model(parts.diffusion_model, precision, device, attention, cache)
    embeddings = folder_paths.get_folder_paths("embeddings")
    clip = load_text_encoder(parts.text_encoder, device, embeddings, precision, cache, patcher.model_size())
    if hidden_size(clip) != caption_width(patcher):
        raise CheckpointError(
            f"text_encoder '{parts.text_encoder.name}' gives {hidden_size(clip)} values a token, the diffusion model "
            f"'{parts.diffusion_model.name}' takes {caption_width(patcher)}. Set text_encoder to 'auto'."
        )
    return patcher, clip, load_vae(parts.vae, device)
