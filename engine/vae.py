"""The VAE: ComfyUI's own class, from a file or a diffusers folder of any width."""

from pathlib import Path

import comfy.diffusers_convert
import comfy.model_patcher
import comfy.sd
import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder

from . import decoder
from .checkpoint import Checkpoint, StateDict, shapes_of
from .residency import fits

FULL_CHANNELS = [128, 256, 512, 512]
LATENT_CHANNELS = 16
NORM_GROUPS = 32


def load_vae(path: Path, device: torch.device | None = None):
    """A VAE with 16 latent channels from a weight file or a diffusers ``vae`` folder. Raises CheckpointError."""
    checkpoint = Checkpoint.read(path)
    entrance = checkpoint.weights.get("decoder.conv_in.weight")
    if entrance is None or entrance.ndim != 4 or entrance.shape[1] != LATENT_CHANNELS:
        raise checkpoint.error(
            f"is not a Flux-type VAE with {LATENT_CHANNELS} latent channels. Choose ae.safetensors from models/vae."
        )
    if "decoder.up_blocks.0.resnets.0.norm1.weight" in checkpoint.weights:
        converted = comfy.diffusers_convert.convert_vae_state_dict(dict(checkpoint.weights))
        checkpoint = checkpoint.replaced(converted)
    widths = _widths(checkpoint)
    layers = checkpoint.setting("layers_per_block", int, 2)
    _check(checkpoint, widths, layers)
    weights, host_config = checkpoint.weights, None
    if widths != FULL_CHANNELS:
        host_config = {"params": {"embed_dim": LATENT_CHANNELS, "ddconfig": _side(widths, layers)}}
        weights = weights | _identity_convolutions()
    vae = comfy.sd.VAE(sd=dict(weights), metadata=checkpoint.metadata, config=host_config, device=device)
    vae.latent_channels = LATENT_CHANNELS
    if device is not None:
        vae.patcher.offload_device = torch.device("cpu")
    _take_over(vae)
    vae.patcher.cached_patcher_init = (_load_patcher, (path, device))
    return vae


def _take_over(vae: comfy.sd.VAE) -> None:
    """Our decoder in the host's place; on a GPU that has room for all weights, those stay there as they are used."""
    module = vae.first_stage_model
    decoder.adopt(module.decoder)
    if decoder.device_refusal(vae.device):
        return
    vae.memory_used_decode = decoder.memory_used(module.decoder)
    if fits(module.state_dict(), vae.vae_dtype, vae.device):
        if vae.patcher.is_dynamic():  # it holds the file's types, and looks up and casts each weight at every use
            module.to(vae.vae_dtype)
            vae.patcher = comfy.model_patcher.ModelPatcher(module, vae.device, vae.patcher.offload_device)
        decoder.lay_out(module.decoder)


def _check(checkpoint: Checkpoint, widths: list[int], layers: int) -> None:
    """Raises CheckpointError unless the weights are those of an encoder and a decoder of these widths."""
    # The host takes the encoder's width as given and reads the decoder's off its weights.
    decoder_width = checkpoint.weights["decoder.conv_in.weight"].shape[0]
    decoder_widths = [width * decoder_width // widths[-1] for width in widths]
    if any(width % NORM_GROUPS for width in decoder_widths):
        decoder_widths = widths
    with torch.device("meta"):
        encoder, decoder = Encoder(**_side(widths, layers)), Decoder(**_side(decoder_widths, layers))
    shapes = shapes_of(encoder, "encoder.") | shapes_of(decoder, "decoder.")
    checkpoint.require(shapes)
    extra = [name for name in checkpoint.weights if name.startswith(("encoder.", "decoder.")) and name not in shapes]
    if extra:
        raise checkpoint.error(f"has weights beyond its {len(widths)} levels: {extra[0]}. Download it again.")


def _load_patcher(path: Path, device, disable_dynamic: bool = False):
    """``disable_dynamic`` is part of the host's factory contract; its VAE class chooses the patcher itself."""
    return load_vae(path, device).patcher


def _widths(checkpoint: Checkpoint) -> list[int]:
    widths = checkpoint.setting("block_out_channels", list, FULL_CHANNELS)
    if not widths or not all(isinstance(width, int) and width > 0 for width in widths):
        raise checkpoint.error(f"has block_out_channels {widths} in its config.json. Download the folder again.")
    return widths


def _side(widths: list[int], layers: int) -> dict:
    """The host's settings of an encoder or decoder."""
    return {
        "double_z": True, "z_channels": LATENT_CHANNELS, "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": widths[0], "ch_mult": [width // widths[0] for width in widths], "num_res_blocks": layers,
        "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip


def _identity_convolutions() -> StateDict:
    """The host's class for a given config has two 1×1 convolutions that a Flux-type VAE has not."""
    made = {}
    for name, width in (("quant_conv", 2 * LATENT_CHANNELS), ("post_quant_conv", LATENT_CHANNELS)):
        made[f"{name}.weight"] = torch.eye(width).reshape(width, width, 1, 1)
        made[f"{name}.bias"] = torch.zeros(width)
    return made
