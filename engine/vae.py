"""The VAE: ComfyUI's own class, from a file or a diffusers folder of any width."""

from pathlib import Path

import comfy.sd
import torch

from . import checkpoint
from .checkpoint import CheckpointError

FULL_CHANNELS = [128, 256, 512, 512]
LATENT_CHANNELS = 16


def load_vae(path: Path, device: torch.device | None = None):
    """A VAE with 16 latent channels from a weight file or a diffusers ``vae`` folder. Raises CheckpointError."""
    label = f"{path.parent.name}/{path.name}" if path.is_dir() else path.name
    weights, metadata = checkpoint.read(path)
    config = checkpoint.read_config(path) if path.is_dir() else {}
    entrance = weights.get("decoder.conv_in.weight")
    if entrance is None or entrance.ndim != 4 or entrance.shape[1] != LATENT_CHANNELS:
        raise CheckpointError(
            f"'{label}' is not a Flux-type VAE with {LATENT_CHANNELS} latent channels. "
            "Choose ae.safetensors from models/vae."
        )
    host_config = None
    if config.get("block_out_channels", FULL_CHANNELS) != FULL_CHANNELS:
        host_config = _small_config(config, label)
        weights = weights | _identity_convolutions()
    try:
        vae = comfy.sd.VAE(sd=weights, metadata=metadata, config=host_config, device=device)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"'{label}' does not fit the VAE architecture: {error}. Download it again.") from error
    vae.throw_exception_if_invalid()
    vae.latent_channels = LATENT_CHANNELS
    vae.patcher.cached_patcher_init = (_load_patcher, (path, device))
    return vae


def _load_patcher(path: Path, device, disable_dynamic: bool = False):
    """``disable_dynamic`` is part of the host's factory contract; its VAE class chooses the patcher itself."""
    return load_vae(path, device).patcher


def _small_config(config: dict, label: str) -> dict:
    try:
        widths = config["block_out_channels"]
        return {
            "params": {
                "embed_dim": LATENT_CHANNELS,
                "ddconfig": {
                    "double_z": True,
                    "z_channels": config["latent_channels"],
                    "resolution": 256,
                    "in_channels": config["in_channels"],
                    "out_ch": config["out_channels"],
                    "ch": widths[0],
                    "ch_mult": [width // widths[0] for width in widths],
                    "num_res_blocks": config["layers_per_block"],
                    "attn_resolutions": [],
                    "dropout": 0.0,
                },
            }
        }
    except KeyError as error:
        raise CheckpointError(f"'{label}/config.json' lacks {error}. Download the folder again.") from error


def _identity_convolutions() -> checkpoint.StateDict:
    """The host's class for a given config has two 1×1 convolutions that a Flux-type VAE has not."""
    made = {}
    for name, width in (("quant_conv", 2 * LATENT_CHANNELS), ("post_quant_conv", LATENT_CHANNELS)):
        made[f"{name}.weight"] = torch.eye(width).reshape(width, width, 1, 1)
        made[f"{name}.bias"] = torch.zeros(width)
    return made
