"""The forms that weights come in: diffusers' names, ComfyUI's quantised formats."""

import json
import re

import torch
from comfy.quant_ops import QUANT_ALGOS

from ..kernels import int4
from . import layouts
from .checkpoint import Checkpoint, StateDict

PRODUCTS = ("int8_tensorwise", "float8_e4m3fn", "float8_e5m2", layouts.FP8)
MARKER = ".comfy_quant"
_QKV = re.compile(r"(.+\.attention)\.to_([qkv])\.(.+)")
_RENAMED = (
    (".attention.to_out.0.", ".attention.out."),
    (".attention.norm_q.", ".attention.q_norm."),
    (".attention.norm_k.", ".attention.k_norm."),
    ("all_x_embedder.2-1.", "x_embedder."),
    ("all_final_layer.2-1.", "final_layer."),
)


def with_comfy_names(checkpoint: Checkpoint) -> Checkpoint:
    """Diffusers' names of Z-Image's weights turned into ComfyUI's; those that have them already stay.

    to_q, to_k and to_v [dim, dim] become the rows of one qkv [3 dim, dim]; row-wise scales are stacked the same way.
    Raises CheckpointError when one of the three is missing or they cannot be stacked.
    """
    if "noise_refiner.0.attention.norm_q.weight" not in checkpoint.weights:
        return checkpoint
    renamed, split = {}, {}
    for name, tensor in checkpoint.weights.items():
        match = _QKV.fullmatch(name)
        if match:
            split.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = tensor
            continue
        for theirs, ours in _RENAMED:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return checkpoint.replaced(renamed | {name: _stack(checkpoint, name, parts) for name, parts in split.items()})


def _stack(checkpoint: Checkpoint, name: str, parts: StateDict) -> torch.Tensor:
    absent = [f"to_{part}" for part in "qkv" if part not in parts]
    if absent:
        raise checkpoint.error(f"lacks {', '.join(absent)} for {name}. It is incomplete: download it again.")
    tensors = [parts[part] for part in "qkv"]
    if name.endswith(MARKER):
        return tensors[0]
    if any(tensor.numel() == 1 for tensor in tensors):
        raise checkpoint.error(
            f"has one scale for a whole matrix ({name}), so to_q, to_k and to_v cannot be joined. "
            "Use the single-file version of this checkpoint."
        )
    return torch.cat(tensors)


def is_ours(checkpoint: Checkpoint) -> bool:
    """Whether any layer is stored in a format of this pack."""
    return any(is_stored_as(checkpoint, form) for form in (layouts.INT4, layouts.FP8))


def is_stored_as(checkpoint: Checkpoint, form: str) -> bool:
    """Whether any layer is stored in that format."""
    return any(settings["format"] == form for _, settings in _quantised_layers(checkpoint))


def storage_only(checkpoint: Checkpoint) -> bool:
    """Whether its config.json says that quantised weights are to be multiplied out: they only travel in that form."""
    return checkpoint.setting("quantization_config", dict, {}).get("dequantize") is True


def check_quantised(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a format that the host does not know and for scales that do not fit."""
    for layer, settings in _quantised_layers(checkpoint):
        if settings["format"] not in QUANT_ALGOS:
            raise checkpoint.error(
                f"stores {layer} in the format '{settings['format']}', which this ComfyUI does not know. "
                "Choose a file of another precision, or update ComfyUI."
            )
        weight, scale = (checkpoint.weights.get(f"{layer}.{part}") for part in ("weight", "weight_scale"))
        if settings["format"] == layouts.INT4 and f"{layer}.weight_groups" not in checkpoint.weights:
            raise checkpoint.error(f"lacks the groups of {layer}. It is incomplete: download it again.")
        if weight is None or scale is None:
            raise checkpoint.error(f"lacks the weight or scale of {layer}. It is incomplete: download it again.")
        if _is_product(settings) and scale.numel() not in (1, weight.shape[0]):
            raise checkpoint.misfit(f"{layer}.weight", weight.shape, torch.Size([scale.numel(), *weight.shape[1:]]))


def expanded(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """Quantised weights multiplied out and rounded to ``dtype``. Raises CheckpointError for a packed format."""
    weights = dict(checkpoint.weights)
    for layer, settings in _quantised_layers(checkpoint):
        stored, scale = weights[f"{layer}.weight"], weights.pop(f"{layer}.weight_scale").float()
        if settings["format"] == layouts.INT4:
            packed = int4.Int4Weight(
                stored, weights.pop(f"{layer}.weight_groups"), scale, settings.get("rotated", False)
            )
            weights[f"{layer}.weight"] = int4.dequantise(packed, dtype)
        elif _is_product(settings):
            scale = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
            weights[f"{layer}.weight"] = (stored.float() * scale).to(dtype)
        else:
            raise checkpoint.error(
                f"is stored as {settings['format']}, which is not multiplied out. Set precision to 'auto'."
            )
        for part in ("comfy_quant", "input_scale"):
            weights.pop(f"{layer}.{part}", None)
    return checkpoint.replaced(weights)


def expandable(checkpoint: Checkpoint) -> bool:
    """Whether `expanded` can multiply all quantised weights out."""
    return all(
        settings["format"] in (layouts.INT4, layouts.FP8) or _is_product(settings)
        for _, settings in _quantised_layers(checkpoint)
    )


def _is_product(settings: dict) -> bool:
    """Whether weight = stored value · scale, without a rotation or packing."""
    rotated = settings.get("convrot", (settings.get("params") or {}).get("convrot", False))  # the host reads both
    return settings["format"] in PRODUCTS and not rotated


def _quantised_layers(checkpoint: Checkpoint) -> list[tuple[str, dict]]:
    """Name of each quantised layer and the settings in its mark, "format" among them."""
    layers = []
    for marker in [name for name in checkpoint.weights if name.endswith(MARKER)]:
        layer = marker.removesuffix(MARKER)
        try:
            settings = json.loads(bytes(checkpoint.weights[marker].tolist()))
        except (ValueError, TypeError) as error:
            raise checkpoint.error(f"has a broken format mark at {layer}. It is damaged: download it again.") from error
        if not isinstance(settings, dict) or "format" not in settings:
            raise checkpoint.error(f"has no format in its mark at {layer}. It is damaged: download it again.")
        layers.append((layer, settings))
    return layers
