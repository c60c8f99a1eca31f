"""The class that our loader gives to the host's VAE decoder: the same arithmetic in channels_last memory.

GroupNorms read their input twice and write it once, whatever stands around them: they take on the biases of the
convolutions before them, SiLU, and residual sums. Convolutions stay the host's own, with its casts, offloading and
patches of weights.

There is no CUDA graph. About 200 launches are queued while the GPU works on earlier ones, so a graph would save little
beyond the first; and it would keep its intermediate results, 1 GiB at 1024x1024, reserved between two pictures.
"""

import functools
from collections import Counter
from collections.abc import Callable

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, Decoder, ResnetBlock

from ..kernels.arguments import FLOATS
from ..kernels.group_norm import group_norm, residual_group_norm
from ..kernels.upsample import upsample
from ..kernels.wide_attention import wide_attention
from .refusal import common_refusal, triton_refusal
from .rehearsal import rehearsed
from .residency import replaced
from .shortage import with_room

FAST = "fast"
ATTENTION_MEMORY = 256 * 2**20  # a run of queries twice over, and q, k, v with their sum at 1024x1024
MARGIN = 1.15  # what the host frees beyond what is counted, for workspaces of convolutions
Convolved = tuple[torch.Tensor, torch.Tensor | None]  # a convolution [B, C, H, W] without its bias, and the bias [C]


class FastDecoder(Decoder):
    """`forwards` counts decodes by the path that ran: FAST, or why it was the host's."""

    forwards: Counter
    norms: list[torch.nn.Module]

    def forward(self, z, **kwargs):
        reason = refusal(self, z, kwargs)
        run = functools.partial(decode, self)
        run = run if self.forwards[FAST] else rehearsed(run, z.device)
        self.forwards[reason or FAST] += 1
        return super().forward(z, **kwargs) if reason else with_room(run, z)


def adopt(module: Decoder) -> None:
    """Make a decoder of the host ours; its weights and everything that holds them stay as they are."""
    module.__class__, module.forwards = FastDecoder, Counter()
    module.norms = [layer for layer in module.modules() if isinstance(layer, torch.nn.GroupNorm)]


def lay_out(module: Decoder) -> None:
    """Have the weights of convolutions in channels_last memory, which would else be made of them at every call.

    A state dict shows them as ever: those who write files ask for contiguous tensors.
    """
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    module.register_state_dict_post_hook(_show_contiguous)


def _show_contiguous(module: Decoder, state_dict: dict, prefix: str, _) -> None:
    for name in state_dict:
        if name.startswith(prefix):
            state_dict[name] = state_dict[name].contiguous()


def memory_used(module: Decoder) -> Callable[[tuple, torch.dtype], float]:
    """The host's `memory_used_decode`: bytes to decode one picture, by the shape [B, 16, H, W] of its latent.

    The most is held at full size: what enters and what leaves the convolution after the last upsampling, or x, h and
    a convolution's result in a block. Of a small picture the attention in the middle holds more.
    """
    block, scale = module.up[0].block[0], 4 ** (len(module.up) - 1)
    values = max(2 * block.in_channels, 3 * block.out_channels) * scale

    def bytes_used(shape, dtype) -> float:
        return max(MARGIN * values * shape[2] * shape[3] * dtype.itemsize, ATTENTION_MEMORY)

    return bytes_used


def device_refusal(device: torch.device) -> str | None:
    """Why the fast decode cannot run on a device; None if it can."""
    if device.type != "cuda":
        return f"it runs on {device.type}"
    return triton_refusal(device)


def refusal(module: FastDecoder, z: torch.Tensor, arguments: dict) -> str | None:
    """Why the fast decode cannot run this request; None if it can. `arguments`: what else the host's got."""
    if reason := common_refusal(z.device):
        return reason
    if arguments:
        return f"the input {next(iter(arguments))} is given"
    if z.ndim != 4 or z.dtype not in FLOATS:
        return f"the latent is {list(z.shape)} of {z.dtype}"
    if any(replaced(norm) for norm in module.norms):
        return "the forward of a norm is replaced"
    return device_refusal(z.device)


def decode(module: Decoder, z: torch.Tensor) -> torch.Tensor:
    """What `Decoder.forward` returns for a latent z [B, 16, H, W]: the picture [B, 3, 8 H, 8 W]."""
    middle = module.mid
    stream = Stream(module.conv_in(z.contiguous(memory_format=torch.channels_last)))
    stream.resnet(middle.block_1)
    stream.attend(middle.attn_1)
    stream.resnet(middle.block_2)
    for level in reversed(module.up):
        for block in level.block:
            stream.resnet(block)
        if hasattr(level, "upsample"):
            stream.upsample(level.upsample.conv)
    out = module.conv_out(stream.normalised(module.norm_out, silu=True)).contiguous()
    return torch.tanh(out) if module.tanh_out else out


class Stream:
    """What flows through the decoder, x + h + shift: the sum is made by whatever reads it next.

    x [B, C, H, W]; h, what the last block adds to it, or None; shift [C], biases that convolutions left out, or None.
    x and h are this object's alone, hence overwritten and freed early.
    """

    def __init__(self, x: torch.Tensor):
        self.x, self.h, self.shift = _channels_last(x), None, None

    def normalised(self, norm: torch.nn.GroupNorm, silu: bool) -> torch.Tensor:
        """The sum normalised; with h, it becomes x on the way."""
        if self.h is None:
            return _group_norm(norm, self.x, silu, self.shift)
        with Weights(norm, self.x) as (weight, bias):
            self.x, y = residual_group_norm(
                self.x, self.h, norm.num_groups, weight, bias, norm.eps, silu, self.shift, x_out=self.x, out=self.h
            )
        self.h = self.shift = None
        return y

    def resnet(self, block: ResnetBlock) -> None:
        if block.in_channels == block.out_channels:
            h, shift = convolve(block.conv1, self.normalised(block.norm1, silu=True))
        else:  # as after upsampling only, which leaves no h: norm1 is the last to read x in its old width
            x, before = self.x, self.shift
            self.x, self.shift = convolve(block.nin_shortcut, x)
            if before is not None:
                self.shift = _sum(self.shift, _carried(block.nin_shortcut, before))
            x = _group_norm(block.norm1, x, silu=True, shift=before, out=x)
            h, shift = convolve(block.conv1, x)
            del x
        h = _group_norm(block.norm2, h, silu=True, shift=shift, out=h)
        self.h, shift = convolve(block.conv2, h)
        self.shift = _sum(self.shift, shift)

    def attend(self, block: AttnBlock) -> None:
        y = self.normalised(block.norm, silu=False)
        q, k, v = (_channels_last(layer(y)) for layer in (block.q, block.k, block.v))
        batch, channels, height, width = q.shape
        rows = (tensor.permute(0, 2, 3, 1).flatten(1, 2) for tensor in (q, k, v))
        out = wide_attention(*rows).view(batch, height, width, channels).permute(0, 3, 1, 2)
        self.h, self.shift = convolve(block.proj_out, out)

    def upsample(self, convolution: torch.nn.Conv2d) -> None:
        large = upsample(self.x, self.h, self.shift)
        self.x = self.h = None
        self.x, self.shift = convolve(convolution, large)


def convolve(layer: torch.nn.Conv2d, x: torch.Tensor) -> Convolved:
    """A convolution as the host's layer computes it, its bias left to whatever reads the result next."""
    if replaced(layer):
        return _channels_last(layer(x)), None
    comfy.ops.run_every_op()
    with Weights(layer, x) as (weight, bias):
        y = layer._conv_forward(x, weight, None)
        # what the host has cast lies in a buffer that it uses again
        bias = bias if bias is None or bias is layer.bias else bias.clone()
    return _channels_last(y), bias


class Weights:
    """A layer's weight and bias as the host would use them on x, for the time of a with block."""

    def __init__(self, layer: torch.nn.Module, x: torch.Tensor):
        self.layer = layer
        self.weight, self.bias, self.stream = comfy.ops.cast_bias_weight(layer, x, offloadable=True)

    def __enter__(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.weight, self.bias

    def __exit__(self, *_) -> None:
        comfy.ops.uncast_bias_weight(self.layer, self.weight, self.bias, self.stream)


def _group_norm(norm: torch.nn.GroupNorm, x: torch.Tensor, silu: bool, shift=None, out=None) -> torch.Tensor:
    with Weights(norm, x) as (weight, bias):
        return group_norm(x, norm.num_groups, weight, bias, norm.eps, silu, shift, out)


def _carried(layer: torch.nn.Conv2d, shift: torch.Tensor) -> torch.Tensor:
    """What a shift [C] before a 1x1 convolution adds behind it: that is affine, whatever is hooked to the layer."""
    both = layer(torch.stack((shift, torch.zeros_like(shift)))[:, :, None, None])
    return (both[0] - both[1]).flatten()


def _sum(shift: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if shift is None or other is None:
        return other if shift is None else shift
    return shift.float() + other.float()


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """x itself, unless a replaced layer has given another layout."""
    return x.contiguous(memory_format=torch.channels_last)
