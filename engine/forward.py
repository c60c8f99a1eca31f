"""The fast forward: the host's NextDiT block by block, with its element-wise work in fused kernels.

The same arithmetic as the host's own forward, in other groupings, so results agree within the compute type's rounding.
It knows text-to-image and image-to-image with any LoRA; `refusal` says what it leaves to the host.

fp16 ends at 65504, which Z-Image exceeds: there the residual stream is held in fp32, and what enters the last product
of each half of a block is scaled by a power of two, which the norm behind it undoes exactly.

In FP8 that last product leaves its scales, of rows and columns, to that norm, which has them nearly for nothing.

Several ranks may compute one request together, each its share of the tokens: `sequence` says how.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import comfy.ops
import torch
from comfy.ldm.lumina.model import FeedForward, JointAttention, JointTransformerBlock, NextDiT, pos_ids_x
from comfy.quant_ops import QuantizedTensor

from ..kernels import attention, attention_fp8, norm, residual, rope, swiglu, swiglu_linear
from ..kernels.arguments import FLOATS
from . import layouts, prompt_batch
from .modulation import Modulation, modulations
from .refusal import bypass_refusal, common_refusal
from .residency import near, replaced, unchanged_weights
from .sequence import WHOLE, Exchange, Ranks

BYPASSED = (JointTransformerBlock, JointAttention, FeedForward, torch.nn.RMSNorm)
KNOWN_ARGUMENTS = {"control", "clip_text_pooled", prompt_batch.LENGTHS}  # pooled text: Z-Image has no use for it
FOREIGN_OPTIONS = ("patches", "patches_replace", "rope_options", "optimized_attention_override")
QK_EPS = torch.finfo(torch.float32).eps  # what the host takes where a norm names none
FP16_FACTOR = 2.0**-7
ROWS_AT_ONCE = 20480  # of a feed-forward: 1.2 GB in 16 bit, a picture of 2048x2048
OUT_AS_SUMS = True  # whether the last product of attention leaves its scales too: its K is short, so it gains less
Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # [B, S, D], or its FP8 codes [B, S, D] and scales [B S, 1]


class Sums(NamedTuple):
    """What half a block computed, [B, S, D]: sums * row_scales [B S, 1] * column_scales [D]."""

    sums: torch.Tensor
    row_scales: torch.Tensor
    column_scales: torch.Tensor


Half = torch.Tensor | Sums
Stream = torch.Tensor | residual.Normed


def refusal(module: NextDiT, context: torch.Tensor | None, options: dict, arguments: dict) -> str | None:
    """Why the fast forward cannot run this request; None if it can. `arguments`: what else the host's forward got."""
    return request_refusal(context, options, arguments) or bypass_refusal(module.bypassed) or norm_refusal(module)


def request_refusal(context: torch.Tensor | None, options: dict, arguments: dict) -> str | None:
    """`refusal`, as far as it does not depend on the module."""
    if context is None:
        return "there is no text"
    if reason := common_refusal(context.device):
        return reason
    for name in FOREIGN_OPTIONS:
        if options.get(name):
            return f"transformer_options has {name}"
    if arguments.get("control") is not None:
        return "a ControlNet is applied"
    for name, value in arguments.items():
        absent = value is None or (isinstance(value, list | tuple) and not value)
        if name not in KNOWN_ARGUMENTS and not absent:
            return f"the input {name} is given"
    return None


def norm_refusal(module: NextDiT) -> str | None:
    """Why the gains of the norms, which the fused kernels read, cannot be read; None if they can."""
    for layer in module.norms:
        if layer.weight_function:
            return "a norm is patched while it runs"
        if layer.weight.dtype not in FLOATS:
            return f"norms are stored as {layer.weight.dtype}"
    return None


@dataclass(frozen=True)
class Compute:
    """dtype: what products are computed in; attention: a backend of `kernels.attention`; rows: of a feed-forward at
    once, None for as many as usual; ranks: that compute it together, None for this process alone."""

    dtype: torch.dtype
    attention: str = "auto"
    rows: int | None = None
    ranks: Ranks | None = None

    @property
    def residual(self) -> torch.dtype:
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    @property
    def factor(self) -> float:
        """What enters the last product of half a block is scaled by."""
        return FP16_FACTOR if self.dtype == torch.float16 else 1.0


def refine_caption(
    module: NextDiT, context: torch.Tensor, compute: Compute, lengths: Sequence[int] = ()
) -> torch.Tensor:
    """The part that knows neither picture nor noise level: [B, T, C] → [B, T padded to 32, D] of the residual type.

    lengths: where the padding of each row begins, if not at T; T padded to 32 is what each of them is padded to.
    """
    (caption,), (rotation,), _ = module.embed_cap(context, device=context.device, dtype=context.dtype)
    for row, length in zip(caption, lengths, strict=bool(lengths)):
        row[length:] = module.cap_pad_token.to(row)
    blocks = module.context_refiner
    return run_blocks(blocks, caption, modulations(blocks, None), rope.angles(rotation)[0], compute)


def rotation_table(module: NextDiT, words: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """(cos, sin) for every token, [words + picture padded to 32, head dim / 2, 2] in fp32; the caption comes first."""
    caption = torch.zeros(1, words, 3, device=device)
    caption[0, :, 0] = torch.arange(words, device=device) + 1.0
    picture = pos_ids_x(words + 1, rows, columns, 1, device)
    picture = torch.nn.functional.pad(picture, (0, 0, 0, -rows * columns % module.pad_tokens_multiple))
    return rope.angles(module.rope_embedder(torch.cat((caption, picture), 1)).movedim(1, 2))[0]


def denoise(
    module: NextDiT,
    compute: Compute,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    caption: torch.Tensor,
    table: torch.Tensor,
) -> torch.Tensor:
    """The part that depends on the noise level: what `NextDiT._forward` returns.

    x: [B, 16, H, W] with H and W multiples of the patch size; timesteps [B]; caption [B, padded words, D] and table as
    `refine_caption` and `rotation_table` give them. Returns [B, 16, H, W]. Ranks that compute it together are all given
    the same, and all return the whole.
    """
    b, channels, height, width = x.shape
    patch, words = module.patch_size, caption.shape[1]
    rows, columns = height // patch, width // patch
    share = compute.ranks.share(b, words, len(table) - words) if compute.ranks else WHOLE
    caption, table, refining_table = caption[:, share.words], *share.angles(table, words)
    time = module.t_embedder((1.0 - timesteps) * module.time_scale, dtype=x.dtype)
    patches = x.view(b, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    picture = module.x_embedder(patches[:, share.picture])
    picture = padded(picture, module.x_pad_token, len(refining_table))
    refiner = module.noise_refiner
    modulated = modulations([*refiner, *module.layers], time)
    picture = run_blocks(refiner, picture, modulated[: len(refiner)], refining_table, compute, share.refining)
    both = torch.cat((caption, picture), 1)
    both = run_blocks(module.layers, both, modulated[len(refiner) :], table, compute, share.joint)
    final = module.final_layer
    out = both[:, caption.shape[1] :] if share.joint else both[:, words : words + rows * columns]
    out = norm.layer_modulate(out.contiguous(), final.adaLN_modulation(time), final.norm_final.eps, dtype=x.dtype)
    out = final.linear(out)
    if share.refining:
        out = share.refining.whole(out)[:, : rows * columns]
    out = out.reshape(b, rows, columns, patch, patch, channels)
    return -out.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, height, width)


def padded(picture: torch.Tensor, token: torch.Tensor, length: int) -> torch.Tensor:
    """picture [B, N, D] with the token [1, D] for what lacks to [B, length, D]."""
    lacking = length - picture.shape[1]
    if not lacking:
        return picture
    return torch.cat((picture, token.to(picture).expand(len(picture), lacking, -1)), 1)


def run_blocks(
    blocks,
    x: torch.Tensor,
    modulated: list[Modulation],
    table: torch.Tensor,
    compute: Compute,
    exchange: Exchange | None = None,
) -> torch.Tensor:
    """x [B, S, D], which may be overwritten, through blocks: [B, S, D] of the residual type.

    modulated: of each block; table [S, head dim / 2, 2]. exchange: with ranks that have other tokens; None if all are
    here. Each pass over x ends half a block and begins the next.
    """
    x, held = x.to(compute.residual).contiguous(), holds_norm(blocks, compute)
    y = begin(x, blocks[0].attention_norm1, modulated[0][0], blocks[0].attention.qkv, compute.dtype)
    last = len(blocks) - 1
    for i, (block, (_, gate_attention, scale_ffn, gate_ffn)) in enumerate(zip(blocks, modulated, strict=True)):
        gates = block.feed_forward.w1, block.feed_forward.w3
        h = attend(block.attention, y, table, compute, exchange)
        x, y = add(x, h, compute, held, block.attention_norm2, gate_attention, block.ffn_norm1, scale_ffn, *gates)
        h = feed_forward(block.feed_forward, y, compute)
        if i == last:
            return end(x, h, compute, held, block.ffn_norm2, gate_ffn)
        after, (scale, *_) = blocks[i + 1], modulated[i + 1]
        x, y = add(x, h, compute, held, block.ffn_norm2, gate_ffn, after.attention_norm1, scale, after.attention.qkv)


def holds_norm(blocks, compute: Compute) -> bool:
    """Whether the residual stream lives on in its norm: that has the stream's own type, and no linear has it in FP8."""
    if compute.dtype == torch.float16:
        return False
    return not any(takes_rows(linear) for block in blocks for linear in linears(block))


def linears(block: JointTransformerBlock) -> tuple[torch.nn.Module, ...]:
    attend, feed = block.attention, block.feed_forward
    return attend.qkv, attend.out, feed.w1, feed.w3, feed.w2


def begin(x, next_norm, scale, next_linear, dtype: torch.dtype) -> Rows:
    """x normalised for the linear that comes next."""
    return norm.rms_modulate(x, near(next_norm.weight, x), scale, next_norm.eps, takes_rows(next_linear), dtype)


def add(
    x: Stream, h: Half, compute: Compute, held: bool, post_norm, gate, next_norm, scale, *next_linears
) -> tuple[Stream, Rows]:
    """x plus what half a block computed, and its norm for the linears that come next; held: in which x lives on."""
    h, *h_scales = with_scales(h)
    given = near(post_norm.weight, h), gate, near(next_norm.weight, h), scale
    if held:
        x = residual.add(x, h, *given, next_norm.eps, out=own(x))
        return x, x.y
    quantise = all(map(takes_rows, next_linears))
    x, *y = norm.residual_rms_modulate(
        x,
        h,
        *given,
        next_norm.eps,
        quantise,
        compute.factor,
        *h_scales,
        compute.dtype,
        x_out=x,
    )
    return x, tuple(y) if quantise else y[0]


def end(x: Stream, h: Half, compute: Compute, held: bool, post_norm, gate) -> torch.Tensor:
    """x plus what the last half of the last block computed."""
    h, *h_scales = with_scales(h)
    gain = near(post_norm.weight, h)
    if held:
        return residual.add(x, h, gain, gate, None, None, post_norm.eps, out=own(x))
    return norm.residual_rms_modulate(
        x, h, gain, gate, None, None, post_norm.eps, False, compute.factor, *h_scales, x_out=x
    )


def own(x: Stream) -> torch.Tensor:
    """The tensor that a stream lies in, which nobody reads after the next addition."""
    return x.y if isinstance(x, residual.Normed) else x


def with_scales(h: Half) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    return h if isinstance(h, Sums) else (h, None, None)


def attend(
    module: JointAttention,
    y: Rows,
    table: torch.Tensor,
    compute: Compute,
    exchange: Exchange | None = None,
) -> Half:
    """The attention half of a block between its norms, [B, S, D] times compute.factor."""
    if exchange is not None:
        return attend_together(module, y, table, compute, exchange)
    qkv = project(module.qkv, y).unflatten(-1, (3, module.n_local_heads, -1))
    gains = near(module.q_norm.weight, qkv), near(module.k_norm.weight, qkv)
    normed = functools.partial(rope.qk_norm_rope, qkv, *gains, table, QK_EPS)
    if compute.attention not in attention_fp8.KERNELS:
        h = attention.attention(*normed(layout="tokens"), backend=compute.attention)
        return project_heads(module.out, h, compute.factor)
    q, k, v = normed(quantise=True)
    if not takes_rows(module.out):
        h = attention_fp8.attention_of_codes(compute.attention, q, k, v)
        return project_heads(module.out, h, compute.factor)
    codes, scales = attention_fp8.rows_of_codes(compute.attention, q, k, v, compute.factor)
    sums = OUT_AS_SUMS and leaves_scales(module.out, len(scales))
    return project(module.out, (codes.flatten(2), scales), sums)


def attend_together(
    module: JointAttention,
    y: Rows,
    table: torch.Tensor,
    compute: Compute,
    exchange: Exchange,
) -> Half:
    """`attend` of own tokens y to the tokens of all ranks. Keys, values and queries travel in 16 bit."""
    heads, outputs = module.n_local_heads, module.n_local_heads * module.head_dim
    apart = exchange.form.ahead and splits(module.qkv, y)
    qkv = None if apart else project(module.qkv, y).unflatten(-1, (3, heads, -1))

    def projected(parts: slice) -> torch.Tensor:
        if not apart:
            return qkv[:, :, parts]
        some = slice(parts.start * outputs, parts.stop * outputs)
        return project_some(module.qkv, some, y).unflatten(-1, (-1, heads, module.head_dim))

    gains = near(module.q_norm.weight, table), near(module.k_norm.weight, table)
    attended, quantise = functools.partial(attention.attention, backend=compute.attention), takes_rows(module.out)
    rows = exchange.attention(projected, gains, table, QK_EPS, attended, quantise, compute.factor)
    sums = OUT_AS_SUMS and quantise and leaves_scales(module.out, len(rows[1]))
    return project(module.out, rows, sums)


def project_heads(linear: torch.nn.Module, h: torch.Tensor, factor: float) -> torch.Tensor:
    """Heads [B, H, S, D / H] times factor and a linear's weight: [B, S, D]."""
    h = h.transpose(1, 2).flatten(2)
    return linear(h if factor == 1.0 else h * factor)


def feed_forward(module: FeedForward, y: Rows, compute: Compute) -> Half:
    """The feed-forward half of a block between its norms: [B, S, D], times compute.factor.

    Its inner values are 2.7 times as wide as x; of many rows one run after another is computed.
    """
    codes = y[0] if isinstance(y, tuple) else y
    shape, rows = codes.shape, codes.shape[:2].numel()
    most = compute.rows or ROWS_AT_ONCE
    how = compute.factor, leaves_scales(module.w2, rows)
    if rows <= most:
        return feed_forward_at_once(module, y, *how)
    run = -(-rows // (16 * -(-rows // most))) * 16  # 16 scales of rows begin where cuBLAS wants them to
    parts = [part.flatten(0, -2).split(run) for part in (y if isinstance(y, tuple) else (y,))]
    pieces = [(piece[0][None], *piece[1:]) for piece in zip(*parts, strict=True)]
    out = [feed_forward_at_once(module, piece if isinstance(y, tuple) else piece[0], *how) for piece in pieces]
    h, row_scales, column_scales = zip(*map(with_scales, out), strict=True)
    h = torch.cat(h, 1).view(shape)
    return h if column_scales[0] is None else Sums(h, torch.cat(row_scales), column_scales[0])


def feed_forward_at_once(module: FeedForward, y: Rows, factor: float, sums: bool) -> Half:
    return project(module.w2, gated(module, y, factor), sums)


def gated(module: FeedForward, y: Rows, factor: float) -> Rows:
    """What the last linear of a feed-forward takes: SiLU of the first's times the second's, times factor."""
    linears, quantise = (module.w1, module.w3), takes_rows(module.w2)
    weights = [linear.weight for linear in linears]
    if isinstance(y, tuple) and quantise and all(linear.bias is None for linear in linears):
        codes, scales = layouts.gate_rows(y[0].flatten(0, 1), y[1], *weights, factor)
        return codes.unflatten(0, y[0].shape[:2]), scales
    if isinstance(y, torch.Tensor) and not quantise and all(is_plain(linear, y) for linear in linears):
        return swiglu_linear.linear(y.flatten(0, 1), *weights, factor).unflatten(0, y.shape[:2])
    gate, value = (project(linear, y) for linear in linears)
    h = swiglu.silu_mul(gate.flatten(0, 1), value.flatten(0, 1), quantise, factor)
    return (h[0].view(gate.shape), h[1]) if quantise else h.view(gate.shape)


def leaves_scales(linear: torch.nn.Module, rows: int) -> bool:
    """Whether the product of so many rows with a linear may leave its scales to the norm behind it."""
    return takes_rows(linear) and layouts.leaves_scales(linear.weight, linear.bias, rows)


def takes_rows(linear: torch.nn.Module) -> bool:
    """Whether a linear takes FP8 rows: its weight is one of ours, computes in FP8, and nothing is hooked to it."""
    changed = linear.weight_function or replaced(linear) or hooked(linear)
    return not changed and layouts.takes_rows(linear.weight)


def hooked(linear: torch.nn.Module) -> bool:
    return bool(linear._forward_hooks or linear._forward_pre_hooks)


def project(linear: torch.nn.Module, y: Rows, sums: bool = False) -> Half:
    """y times a linear's weight, [B, S, N] in the linear's own type; or its `sums`, if it `leaves_scales`."""
    if isinstance(y, torch.Tensor):
        return linear(y)
    (codes, scales), weight = y, linear.weight
    rows, shape = codes.flatten(0, 1), codes.shape[:2]
    if sums:
        h = layouts.sum_rows(rows, weight)
        return Sums(h.unflatten(0, shape), scales, layouts.column_scales(weight))
    return layouts.multiply_rows(rows, scales, weight, linear.bias).unflatten(0, shape)


def splits(linear: torch.nn.Module, y: Rows) -> bool:
    """Whether outputs of a linear can be computed apart: it is nothing but a product with the weight as it lies."""
    weight, codes = linear.weight, y[0] if isinstance(y, tuple) else y
    own_product = isinstance(linear, getattr(comfy.ops, "CublasLinear", ()))  # the host's --fast cublas_ops
    as_it_is = linear.bias is None and unchanged_weights([linear]) is not None and not own_product
    return as_it_is and weight.device == codes.device and (isinstance(y, tuple) or weight.dtype == y.dtype)


def is_plain(linear: torch.nn.Module, y: Rows) -> bool:
    """Whether a linear of y is nothing but the product of two plain tensors, and nobody watches it."""
    quantised = isinstance(linear.weight, QuantizedTensor)
    return splits(linear, y) and not (hooked(linear) or quantised) and linear.weight.is_contiguous()


def project_some(linear: torch.nn.Module, outputs: slice, y: Rows) -> torch.Tensor:
    """Some outputs of `project`, of a linear that `splits`."""
    weight = layouts.outputs(linear.weight, outputs)
    if isinstance(y, torch.Tensor):
        return torch.nn.functional.linear(y, weight)
    codes, scales = y
    return layouts.multiply_rows(codes.flatten(0, 1), scales, weight).unflatten(0, codes.shape[:2])
