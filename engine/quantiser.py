"""From 16-bit weights to ours: quantised on the GPU while loading, kept in a file beside the original on request."""

import logging
import re
import time
from pathlib import Path

import comfy.model_management as management
import comfy.utils
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..kernels import fp8, int4
from . import formats, layouts
from .checkpoint import Checkpoint
from .operations import MARKER, mark

# Modulation, embedders, norms and the final layer are small and sensitive: they keep their 16 bits.
BLOCK_LINEAR = re.compile(r"(\w+_refiner|layers)\.\d+\.(attention\.(qkv|out)|feed_forward\.w[123])\.weight")
# The text encoder's too; its embedding table is looked up, not multiplied with.
TEXT_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
FORMS = {"fp8": layouts.FP8, "int4": layouts.INT4, "int4-fp8": layouts.INT4}
WORKSPACE = 2**30  # bytes that quantising one weight takes at most
SOURCE = "zimage_source"  # metadata of a cache file: what it was made from


def quantised(
    checkpoint: Checkpoint, precision: str, device: torch.device, linears: re.Pattern = BLOCK_LINEAR
) -> Checkpoint:
    """The weights named by `linears` in the form of a precision (FORMS), the others as they are; results on the CPU.

    Weights in another quantised format are multiplied out first. Raises CheckpointError.
    """
    form = FORMS[precision]
    checkpoint = formats.expanded(checkpoint, torch.bfloat16)
    if device.type == "cuda":
        management.free_memory(WORKSPACE, device)
    names = [name for name in checkpoint.weights if linears.fullmatch(name)]
    weights, start, progress = dict(checkpoint.weights), time.monotonic(), comfy.utils.ProgressBar(len(names))
    logging.info("Z-Image-Turbo: quantising %d weights to %s on %s.", len(names), form, device)
    for name in names:
        management.throw_exception_if_processing_interrupted()
        layer = name.removesuffix(".weight")
        made = parts(layer, weights.pop(name).to(device), form)
        weights |= {key: value.cpu() for key, value in made.items()}
        progress.update(1)
    logging.info("Z-Image-Turbo: quantised in %.1f s.", time.monotonic() - start)
    return checkpoint.replaced(weights)


def parts(layer: str, weight: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    """What stands in a file for one linear weight [N, K], on the weight's device."""
    if form == layouts.FP8:
        codes, scales = fp8.quantise_weight(weight)
        made = {"weight": codes, "weight_scale": scales, MARKER: mark(form)}
    else:
        packed = int4.quantise(weight)
        made = {"weight": packed.codes, "weight_scale": packed.scales, "weight_groups": packed.groups}
        made[MARKER] = mark(form, packed.rotated)
    return {f"{layer}.{name}": part for name, part in made.items()}


def cache_path(path: Path, precision: str) -> Path:
    """Where the quantised form of a file or folder is kept: beside it."""
    return path.with_name(f"{path.stem}_{FORMS[precision].removeprefix('zimage_')}.safetensors")


def source_of(path: Path) -> str:
    """What tells one version of a file or folder from another: the names, sizes and times of its files."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return ";".join(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)


def read_cache(path: Path, precision: str) -> Checkpoint | None:
    """The cached form of `path`, if there is one and it was made from what is there now."""
    cached = cache_path(path, precision)
    if not cached.is_file():
        return None
    checkpoint = Checkpoint.read(cached)
    if checkpoint.metadata.get(SOURCE) == source_of(path):
        return checkpoint.configured(path) if path.is_dir() else checkpoint
    logging.info("Z-Image-Turbo: %s was made from another version of %s; quantising anew.", cached.name, path.name)
    return None


def write_cache(checkpoint: Checkpoint, path: Path, precision: str) -> None:
    """Keep the quantised form; a file that is half written is never seen under the final name.

    A disk that is full or read-only is logged: the model itself can be used.
    """
    cached = cache_path(path, precision)
    partial = cached.with_suffix(".partial")
    weights = {name: weight.contiguous() for name, weight in checkpoint.weights.items()}
    try:
        save_file(weights, partial, metadata={"format": "pt", SOURCE: source_of(path)})
        partial.replace(cached)
    except (OSError, SafetensorError) as error:
        logging.warning("Z-Image-Turbo: %s could not be kept: %s", cached, error)
        partial.unlink(missing_ok=True)
        return
    logging.info("Z-Image-Turbo: kept %s (%.1f GB).", cached, cached.stat().st_size / 1e9)
