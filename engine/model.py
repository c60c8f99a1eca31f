"""The diffusion model: ComfyUI's own NextDiT inside a ModelPatcher, with our class in its place."""

from pathlib import Path

import comfy.model_detection
import comfy.model_management as management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.lumina.model import NextDiT

from . import checkpoint
from .checkpoint import CheckpointError, StateDict

OFFICIAL_FILE = "z_image_turbo_bf16.safetensors"
FULL_WIDTH = 3840
LATENT_SCALE = 8
NATIVE_SIZE = "native_size"
PRECISIONS = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class TurboNextDiT(NextDiT):
    """The class that our loader gives to the host's module: what it does not override is the host's own forward."""


def load_model(path: Path, precision: str = "auto", device: torch.device | None = None, disable_dynamic: bool = False):
    """A MODEL (ModelPatcher) from a weight file or a diffusers ``transformer`` folder.

    precision: a key of PRECISIONS. 'auto' keeps what the file stores and computes in what the host prefers on the
    device; the others hold and compute in that type, quantised weights multiplied out.
    device: where it computes; None is the host's choice. Raises CheckpointError.
    """
    label = f"{path.parent.name}/{path.name}" if path.is_dir() else path.name
    folder_config = checkpoint.read_config(path) if path.is_dir() else {}
    weights, metadata = _host_names(*checkpoint.read(path))
    config = _host_config(weights, metadata, label)
    load_device = device or management.get_torch_device()
    dtype = PRECISIONS[precision] or _preferred_dtype(config, weights, load_device)
    storage_only = folder_config.get("quantization_config", {}).get("dequantize", False)
    if config.quant_config and (precision != "auto" or storage_only):
        weights = checkpoint.expand(weights, dtype, label)
        config.quant_config = None
    patcher = _build(config, weights, dtype, load_device, disable_dynamic, label)
    patcher.model.diffusion_model.__class__ = TurboNextDiT
    patcher.set_attachments(NATIVE_SIZE, LATENT_SCALE * folder_config.get("sample_size", 128))
    patcher.cached_patcher_init = (load_model, (path, precision, device))
    return patcher


def caption_width(patcher) -> int:
    """Width of the text encoder's states that this model expects."""
    return patcher.model.model_config.unet_config["cap_feat_dim"]


def _host_names(weights: StateDict, metadata: dict) -> tuple[StateDict, dict]:
    """Without a checkpoint's prefix, in ComfyUI's names, older fp8-scaled files in the host's present format."""
    prefix = comfy.model_detection.unet_prefix_from_state_dict(weights)
    inner = comfy.utils.state_dict_prefix_replace(weights, {prefix: ""}, filter_keys=True)
    weights, metadata = comfy.utils.convert_old_quants(inner or weights, "", metadata=metadata)
    return checkpoint.comfy_names(weights), metadata


def _host_config(weights: StateDict, metadata: dict, label: str):
    """The host's description of the model; for a width other than the official one, read off the weights."""
    embedder = weights.get("cap_embedder.1.weight")
    if embedder is None or "cap_pad_token" not in weights or "noise_refiner.0.adaLN_modulation.0.weight" not in weights:
        raise CheckpointError(
            f"'{label}' is not a Z-Image-Turbo diffusion model: its weights are those of another architecture. "
            f"Choose {OFFICIAL_FILE} or another Z-Image file from models/diffusion_models."
        )
    if embedder.shape[0] == FULL_WIDTH:
        config = comfy.model_detection.model_config_from_unet(weights, "", metadata=metadata)
    else:
        config = comfy.supported_models.ZImage(_small_config(weights, label))
        config.quant_config = comfy.utils.detect_layer_quantization(weights, "")
    return config


def _small_config(weights: StateDict, label: str) -> dict:
    try:
        caption = weights["cap_embedder.1.weight"]
        head = weights["noise_refiner.0.attention.q_norm.weight"].shape[0]
        width, layers = caption.shape[0], comfy.model_detection.count_blocks(weights, "layers.{}.")
        return {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": weights["x_embedder.weight"].shape[1] // 4,
            "dim": width,
            "cap_feat_dim": caption.shape[1],
            "n_layers": layers,
            "qk_norm": True,
            "n_refiner_layers": comfy.model_detection.count_blocks(weights, "noise_refiner.{}."),
            "n_heads": width // head,
            "n_kv_heads": width // head,
            "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "time_scale": 1000.0,
            "z_image_modulation": True,
            "pad_tokens_multiple": 32,
            "ffn_dim_multiplier": weights["noise_refiner.0.feed_forward.w1.weight"].shape[0] / width,
        }
    except KeyError as error:
        raise CheckpointError(f"'{label}' lacks the weight {error}. It is incomplete: download it again.") from error


def _preferred_dtype(config, weights: StateDict, device: torch.device) -> torch.dtype:
    stored = None if config.quant_config else comfy.utils.weight_dtype(weights)
    return management.unet_dtype(
        device=device,
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=stored,
    )


def _build(config, weights: StateDict, dtype: torch.dtype, device: torch.device, disable_dynamic: bool, label: str):
    """The host's load_diffusion_model_state_dict for a known config, with every missing weight an error."""
    offload_device = management.unet_offload_device()
    held = None if config.quant_config else dtype
    config.set_inference_dtype(
        dtype, management.unet_manual_cast(held, device, config.supported_inference_dtypes), device=device
    )
    model = config.get_model(weights, "")
    if type(model.diffusion_model) is not NextDiT:
        raise CheckpointError(f"'{label}' is a Z-Image variant that this loader does not know. Use the stock loader.")
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=device, offload_device=offload_device)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    _fill(model.diffusion_model, config.process_unet_state_dict(weights), patcher.is_dynamic(), label)
    return patcher


def _fill(module: torch.nn.Module, weights: StateDict, assign: bool, label: str) -> None:
    try:
        missing, _ = module.load_state_dict(weights, strict=False, assign=assign)
    except RuntimeError as error:
        raise CheckpointError(
            f"'{label}' does not fit the Z-Image architecture: {str(error).splitlines()[-1].strip()} "
            "The file is damaged or belongs to another model."
        ) from error
    # The host's quantised layers leave an absent weight at None instead of reporting it.
    missing += [
        f"{name}.weight"
        for name, part in module.named_modules()
        if hasattr(part, "in_features") and part.weight is None
    ]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(f"'{label}' lacks weights: {shown}. It is incomplete: download it again.")
