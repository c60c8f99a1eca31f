"""From 16-bit weights to ours: quantised on the GPU while loading."""

import re
import time

import comfy.model_management as management
import comfy.utils
import torch

from ..kernels import fp8, int4
from . import formats, layouts, progress, staging
from .checkpoint import Checkpoint
from .operations import MARKER, mark

# Modulation, embedders, norms and the final layer are small and sensitive: they keep their 16 bits.
BLOCK_LINEAR = re.compile(r"(\w+_refiner|layers)\.\d+\.(attention\.(qkv|out)|feed_forward\.w[123])\.weight")
# The text encoder's too; its embedding table is looked up, not multiplied with.
TEXT_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
FORMS = {"fp8": layouts.FP8, "int4": layouts.INT4, "int4-fp8": layouts.INT4}
SAMPLE = 16, 4096  # of the shape of a weight, for compiling
WORKSPACE = 2**30  # bytes that quantising one weight takes at most


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
    weights, start, bar = dict(checkpoint.weights), time.monotonic(), comfy.utils.ProgressBar(len(names))
    progress.tell(
        f"quantising {len(names)} weights of {checkpoint.label} to {form.removeprefix('zimage_')} on {device}"
    )
    for made in staging.passed(weights, names, device, lambda name, weight: parts(name, weight, form)):
        management.throw_exception_if_processing_interrupted()
        weights |= made
        bar.update(1)
    progress.tell(f"quantised {checkpoint.label} in {time.monotonic() - start:.1f} s")
    return checkpoint.replaced(weights)


def parts(name: str, weight: torch.Tensor, form: str, rotate: bool | None = None) -> dict[str, torch.Tensor]:
    """What stands in a file for the linear weight [N, K] of this name, on its device; rotate: as in `int4.quantise`."""
    if form == layouts.FP8:
        codes, scales = fp8.quantise_weight(weight)
        made = {"weight": codes, "weight_scale": scales, MARKER: mark(form)}
    else:
        packed = int4.quantise(weight, rotate)
        made = {"weight": packed.codes, "weight_scale": packed.scales, "weight_groups": packed.groups}
        made[MARKER] = mark(form, packed.rotated)
    layer = name.removesuffix("weight")
    return {layer + kind: part for kind, part in made.items()}


def compile_ahead(precision: str, device: torch.device) -> None:
    """Compile what quantises: beside other kernels, which nobody waits for yet, that takes twice as long."""
    if device.type == "cuda":
        parts("weight", torch.randn(*SAMPLE, device=device), FORMS[precision])
