"""The diffusion model: ComfyUI's own NextDiT inside a ModelPatcher, with our class in its place."""

from pathlib import Path

import comfy.model_detection
import comfy.model_management as management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.lumina.model import NextDiT
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..kernels import fp8
from ..kernels.attention import ATTENTION, AttentionRequest
from ..kernels.registry import capability
from . import cache_file, compiling, conditioning, formats, layouts, measured, quantiser, turbo
from .checkpoint import Checkpoint, StateDict, shapes_of
from .operations import operations
from .residency import fits

OFFICIAL_FILE = "z_image_turbo_bf16.safetensors"
FULL_WIDTH = 3840
LATENT_SCALE = 8
HEAD_AXES = [32, 48, 48]
OFFICIAL_SAMPLE_SIZE = 128  # in latent pixels, as diffusers counts
# For the host's estimate, 0.01 MiB times bytes of a value times this for a latent pixel. A token, of four pixels, holds
# at most the feed-forward's three inner rows and five of the stream, 100 KB in 16 bit at full width. The host's own
# factor, 2.8, makes it offload other models that have room, as it doubles the estimate for guidance as well.
MEMORY_USAGE_FACTOR = 1.4
PREVIEW_COLOURS = ("latent_rgb_factors", "latent_rgb_factors_bias")
SIGNATURE = (
    "cap_embedder.1.weight",
    "cap_pad_token",
    "x_embedder.weight",
    "noise_refiner.0.adaLN_modulation.0.weight",
    "noise_refiner.0.attention.q_norm.weight",
    "noise_refiner.0.feed_forward.w1.weight",
)
NATIVE_SIZE = "native_size"
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRECISIONS = ("auto", *FLOATS, *quantiser.FORMS)
ATTENTIONS = ("auto", *ATTENTION.backends)


def load_model(
    path: Path,
    precision: str = "auto",
    device: torch.device | None = None,
    attention: str = "auto",
    cache: bool = False,
    disable_dynamic: bool = False,
):
    """A MODEL (ModelPatcher) from a weight file or a diffusers ``transformer`` folder.

    precision: one of PRECISIONS. 'auto' keeps what the file stores and computes in what the host prefers on the
    device; the floats hold and compute in that type, quantised weights multiplied out; the others quantise the
    blocks' weights. device: where it computes; None is the host's choice. attention: a backend of
    `kernels.attention`. cache: keep the quantised form beside the file. Raises CheckpointError, and ValueError for a
    precision that the device does not have.
    """
    load_device = device or management.get_torch_device()
    check_precision(precision, load_device)
    compiling.announce(load_device)
    layouts.register()
    cached = cache_file.read(path, precision) if precision in quantiser.FORMS else None
    checkpoint = _with_host_names(cached or Checkpoint.read(path))
    sample_size = checkpoint.setting("sample_size", int, OFFICIAL_SAMPLE_SIZE)
    preview_colours = {name: checkpoint.setting(name, list, []) for name in PREVIEW_COLOURS}
    config = _host_config(checkpoint)
    formats.check_quantised(checkpoint)
    checkpoint.require(shapes_of(_empty_module(config)))
    dtype = FLOATS.get(precision) or _preferred_dtype(config, checkpoint.weights, load_device)
    compute_dtype = management.unet_manual_cast(dtype, load_device) or dtype
    check_attention(attention, load_device, compute_dtype)
    heads, width = config.unet_config["n_heads"], config.unet_config["dim"]
    allowed = turbo.FP8_ERROR if _rounds_to_fp8(precision, config, load_device) else 0.0
    form = quantiser.FORMS.get(precision)
    to_quantise = form is not None and not formats.is_stored_as(checkpoint, form)
    if to_quantise:
        quantiser.compile_ahead(precision, load_device)
    # they are compiled while weights are read
    measured.foresee_attention(attention, load_device, compute_dtype, heads, width // heads, allowed)
    if to_quantise:
        checkpoint = quantiser.quantised(checkpoint, precision, load_device)
        if cache:
            cache_file.write(checkpoint, path, precision)
    elif form is None and config.quant_config and (precision in FLOATS or formats.storage_only(checkpoint)):
        checkpoint = formats.expanded(checkpoint, dtype)
    config.quant_config = comfy.utils.detect_layer_quantization(checkpoint.weights, "")
    if formats.is_ours(checkpoint):
        config.custom_operations = operations(dtype, _compute(precision, load_device))
    resident = disable_dynamic or fits(checkpoint.weights, dtype, load_device)
    patcher = _build(config, checkpoint.weights, dtype, load_device, resident)
    turbo.adopt(patcher.model.diffusion_model, attention, patcher.model)
    patcher.add_callback(CallbacksMP.ON_DETACH, turbo.free_memory)
    patcher.add_wrapper(WrappersMP.PREPARE_SAMPLING, conditioning.nearby)
    for name, values in preview_colours.items():
        if values:  # a latent space of its own; without them the host previews in the official one's colours
            setattr(patcher.model.latent_format, name, values)
    patcher.set_attachments(NATIVE_SIZE, LATENT_SCALE * sample_size)
    patcher.cached_patcher_init = (load_model, (path, precision, device, attention, cache))
    return patcher


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError, with the reason, for a precision that the device does not have."""
    reason = fp8.supported(device) if precision in ("fp8", "int4-fp8") else None
    if reason:
        raise ValueError(
            f"precision '{precision}' cannot be used on {device}: {reason}. "
            f"Choose 'auto', 'int4' or '{_unquantised(device)}'."
        )


def _unquantised(device: torch.device) -> str:
    """The precision of whole weights that a device computes in itself; in another, the host casts to fp32."""
    if device.type == "cpu":
        return "fp32"
    return "fp16" if device.type == "cuda" and capability(device) < (8, 0) else "bf16"


def check_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError, with the reason, for a named attention backend that the device cannot run."""
    request = AttentionRequest(
        device=device, dtype=dtype, batch=1, heads=30, tokens=4128, keys=4128, head_dim=sum(HEAD_AXES)
    )
    reasons = ATTENTION.refusals(request)
    if reasons.get(name):
        able = ", ".join(other for other, reason in reasons.items() if reason is None)
        raise ValueError(
            f"attention '{name}' cannot be used on {device}: it {reasons[name]}. Choose 'auto' or: {able}."
        )


def _rounds_to_fp8(precision: str, config, device: torch.device) -> bool:
    """Whether products will, as far as precision and file tell."""
    kept = precision == "auto" and config.quant_config is not None and fp8.supported(device) is None
    return kept or precision in ("fp8", "int4-fp8")


def _compute(precision: str, device: torch.device) -> str:
    """How int4 weights multiply: as the precision says; with 'auto', the fastest that the device has."""
    wanted = precision == "int4-fp8" or (precision == "auto" and fp8.supported(device) is None)
    return layouts.COMPUTE_FP8 if wanted else layouts.COMPUTE_16


def caption_width(patcher) -> int:
    """Width of the text encoder's states that this model expects."""
    return patcher.model.model_config.unet_config["cap_feat_dim"]


def _with_host_names(checkpoint: Checkpoint) -> Checkpoint:
    """Without a whole checkpoint's prefix, in ComfyUI's names, older fp8-scaled files in the host's present format."""
    convert = comfy.utils.convert_old_quants
    weights, metadata = convert(dict(checkpoint.weights), "", metadata=checkpoint.metadata)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(weights)
    inner = comfy.utils.state_dict_prefix_replace(weights, {prefix: ""}, filter_keys=True)
    if inner:
        # Metadata names whole keys and has been applied; the older form's mark may stand behind the prefix.
        weights = inner if "_quantization_metadata" in metadata else convert(inner, "", metadata=metadata)[0]
    return formats.with_comfy_names(checkpoint.replaced(weights, metadata))


def _host_config(checkpoint: Checkpoint):
    """The host's description of the model; for a width other than the official one, read off the weights."""
    weights = checkpoint.weights
    if not all(name in weights for name in SIGNATURE):
        raise checkpoint.error(
            "is not a Z-Image-Turbo diffusion model: its weights are those of another architecture. "
            f"Choose {OFFICIAL_FILE} or another Z-Image file from models/diffusion_models."
        )
    if "dec_net.cond_embed.weight" in weights or "siglip_embedder.0.weight" in weights:
        raise checkpoint.error("is a Z-Image variant that this loader does not know. Use the stock loader.")
    if weights["cap_embedder.1.weight"].shape[0] == FULL_WIDTH:
        return comfy.model_detection.model_config_from_unet(weights, "", metadata=checkpoint.metadata)
    config = comfy.supported_models.ZImage(_small_config(weights))
    config.quant_config = comfy.utils.detect_layer_quantization(weights, "")
    return config


def _small_config(weights: StateDict) -> dict:
    width, caption = weights["cap_embedder.1.weight"].shape
    heads = width // weights["noise_refiner.0.attention.q_norm.weight"].shape[0]
    count = comfy.model_detection.count_blocks
    return {
        "image_model": "lumina2", "patch_size": 2, "in_channels": weights["x_embedder.weight"].shape[1] // 4,
        "dim": width, "cap_feat_dim": caption, "n_heads": heads, "n_kv_heads": heads, "qk_norm": True,
        "n_layers": count(weights, "layers.{}."), "n_refiner_layers": count(weights, "noise_refiner.{}."),
        "axes_dims": HEAD_AXES, "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "time_scale": 1000.0,
        "ffn_dim_multiplier": weights["noise_refiner.0.feed_forward.w1.weight"].shape[0] / width,
        "z_image_modulation": True, "pad_tokens_multiple": 32,
    }  # fmt: skip


def _empty_module(config) -> NextDiT:
    return NextDiT(**config.unet_config, device="meta", operations=comfy.ops.disable_weight_init)


def _preferred_dtype(config, weights: StateDict, device: torch.device) -> torch.dtype:
    stored = None if config.quant_config else comfy.utils.weight_dtype(weights)
    return management.unet_dtype(
        device=device,
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=stored,
    )


def _build(config, weights: StateDict, dtype: torch.dtype, device: torch.device, disable_dynamic: bool):
    """What the host's load_diffusion_model_state_dict does once it knows the config."""
    # The host's own offload device is that of its main GPU under --highvram: wrong for a model placed elsewhere.
    chosen_elsewhere = device != management.get_torch_device()
    offload_device = torch.device("cpu") if chosen_elsewhere else management.unet_offload_device()
    held = None if config.quant_config else dtype
    config.set_inference_dtype(
        dtype, management.unet_manual_cast(held, device, config.supported_inference_dtypes), device=device
    )
    model = config.get_model(weights, "")
    model.memory_usage_factor = MEMORY_USAGE_FACTOR
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=device, offload_device=offload_device)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    if held and not patcher.is_dynamic():  # the host's lazy layers would hold the file's type and never cast it
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
    model.load_model_weights(dict(weights), "", assign=patcher.is_dynamic())
    return patcher
