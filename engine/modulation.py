"""Scales and gates of all blocks, from one embedding of the noise level: in one product where layers are plain."""

from collections.abc import Sequence

import torch
from comfy.ldm.lumina.model import JointTransformerBlock
from comfy.quant_ops import QuantizedTensor

from ..kernels import modulation
from ..kernels.arguments import FLOATS
from .refusal import bypass_refusal
from .residency import unchanged_weights

Modulation = tuple[torch.Tensor | None, ...]  # scale and gate of the attention, of the feed-forward: [B, D] or None


def modulations(blocks: Sequence[JointTransformerBlock], time: torch.Tensor | None) -> list[Modulation]:
    """Of each block; None four times without a `time` [B, 256]."""
    if time is None:
        return [(None,) * 4 for _ in blocks]
    layers = [block.adaLN_modulation for block in blocks]
    if plain(layers, time.device):
        linears = [layer[0] for layer in layers]
        together = modulation.products(time, [one.weight for one in linears], [one.bias for one in linears])
    else:
        together = [layer(time) for layer in layers]
    return [each.chunk(4, -1) for each in together]


def plain(layers: Sequence[torch.nn.Sequential], device: torch.device) -> bool:
    """Whether layers are linears that are used as they are, with weights of one shape and type on the device."""
    linears = [layer[0] for layer in layers]
    if unchanged_weights(linears) is None or bypass_refusal((*layers, *linears)):
        return False
    return all(alike([getattr(linear, name) for linear in linears], device) for name in ("weight", "bias"))


def alike(tensors: Sequence[torch.Tensor], device: torch.device) -> bool:
    shape, dtype = tensors[0].shape, tensors[0].dtype
    return dtype in FLOATS and all(
        tensor.shape == shape
        and tensor.dtype == dtype
        and tensor.device == device
        and tensor.is_contiguous()
        and not isinstance(tensor, QuantizedTensor)
        for tensor in tensors
    )
