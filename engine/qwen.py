"""The fast forward of Qwen3 as a text encoder: the host's layers one by one, element-wise work in fused kernels.

The same arithmetic as the host's own forward in other groupings, with products in `compute_type` and sums in fp32: the
host computes all of it in fp32. Layers behind the one whose states are wanted are not run.
"""

import functools
from collections.abc import Callable, Sequence

import comfy.model_management as management
import torch
from comfy.sd1_clip import SDClipModel
from comfy.text_encoders.llama import MLP, Attention, Llama2_, RMSNorm, TransformerBlock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..kernels import norm, swiglu
from ..kernels.arguments import FLOATS
from ..kernels.rope_half import qk_norm_rope_half
from .pool import Prompt
from .refusal import bypass_refusal, common_refusal
from .residency import near

BYPASSED = (TransformerBlock, Attention, MLP, RMSNorm)
# Not cuDNN's attention, which makes a plan for every length of prompt that it meets.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def compute_type(device: torch.device) -> torch.dtype:
    """What products are computed in: bf16 where the device has it, else fp32; fp16 has too short a range."""
    return torch.bfloat16 if management.should_use_bf16(device) else torch.float32


def layers_wanted(encoder: SDClipModel) -> int | None:
    """How many layers stand before the states that are wanted; None if more than one layer's states are."""
    if encoder.layer == "last":
        return encoder.num_layers
    if encoder.layer != "hidden":
        return None
    index = encoder.layer_idx + (encoder.num_layers if encoder.layer_idx < 0 else 0)
    return index + 1 if 0 <= index < encoder.num_layers else None


def refusal(encoder: SDClipModel, embeds: torch.Tensor, counts: list[int], embeds_info: list[dict]) -> str | None:
    """Why the fast forward cannot run this request; None if it can.

    embeds [B, T, D], counts (unmasked tokens of each text) and embeds_info (what stands among the tokens) as the
    host's `process_tokens` gives them.
    """
    if reason := common_refusal(embeds.device):
        return reason
    if layers_wanted(encoder) is None:
        return f"the states of layer {encoder.layer_idx if encoder.layer == 'hidden' else encoder.layer} are wanted"
    if sum(counts) != embeds.shape[0] * embeds.shape[1]:
        return "there is padding among the tokens"
    foreign = [info["type"] for info in embeds_info if info["type"] != "embedding"]
    if foreign:
        return f"the text holds a {foreign[0]}"
    return bypass_refusal(encoder.bypassed) or norm_refusal(encoder)


def norm_refusal(encoder: SDClipModel) -> str | None:
    """Why the gains of the norms, which the fused kernels read, cannot be read; None if they can."""
    for part in encoder.bypassed:
        if isinstance(part, RMSNorm) and part.weight.dtype not in FLOATS:
            return f"norms are stored as {part.weight.dtype}"
    return None


def rotation_table(model: Llama2_, tokens: int, device: torch.device) -> torch.Tensor:
    """(cos, sin) of the host for every place, [tokens, head dim / 2, 2] in fp32."""
    cos, sin, _ = model.compute_freqs_cis(torch.arange(tokens, device=device)[None], device)
    return torch.stack((cos[0, 0, :, : sin.shape[-1]], sin[0, 0]), -1).float().contiguous()


@sdpa_kernel(ATTENTION)
def run_layers(
    layers: Sequence[TransformerBlock],
    dtype: torch.dtype,
    x: torch.Tensor,
    table: torch.Tensor,
    prompt: Prompt | None = None,
) -> torch.Tensor:
    """x [B, T, D] fp32 through layers: [B, T, D] fp32. table: see `rotation_table`.

    prompt: with B = 1, where the keys and values of tokens before x are kept, and those of x go.
    Each pass over x ends half a layer and begins the next; the first leaves what was given as it is.
    """
    first, stream = layers[0].input_layernorm, None
    mask = causal_mask(x, prompt.known, dtype) if prompt is not None and prompt.known else None
    y = norm.rms_modulate(x, near(first.weight, x), None, first.eps, dtype=dtype)
    for number, (layer, after) in enumerate(zip(layers, (*layers[1:], None), strict=True)):
        with_known = None if prompt is None else functools.partial(prompt.with_known, number)
        between, h = layer.post_attention_layernorm, attend(layer.self_attn, y, table, with_known, mask)
        stream, y = norm.add_rms(x, h, near(between.weight, x), between.eps, x_out=stream)
        h = feed_forward(layer.mlp, y)
        if after is None:
            return stream.add_(h)
        following = after.input_layernorm
        x, y = norm.add_rms(stream, h, near(following.weight, x), following.eps, x_out=stream)


def causal_mask(x: torch.Tensor, known: int, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores of x [B, T, D] behind `known` tokens: [T, known + T], as each row attends to itself
    and to what is before it."""
    rows = x.shape[1]
    return torch.full((rows, known + rows), float("-inf"), dtype=dtype, device=x.device).triu_(known + 1)


def attend(
    module: Attention,
    y: torch.Tensor,
    table: torch.Tensor,
    with_known: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention half of a layer behind its norm: [B, T, D]. A token attends to itself and to those before it.

    with_known: puts the keys and values of tokens before y in front of its own; mask: says then who attends to what.
    """
    q, k, v = (
        linear(y).unflatten(-1, (-1, module.head_dim)) for linear in (module.q_proj, module.k_proj, module.v_proj)
    )
    gains = near(module.q_norm.weight, y), near(module.k_norm.weight, y)
    q, k = qk_norm_rope_half(q, k, *gains, table, module.q_norm.eps)
    if with_known is not None:
        k, v = with_known(k, v)
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    grouped = module.num_heads != module.num_kv_heads
    h = scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return module.o_proj(h.transpose(1, 2).flatten(2))


def feed_forward(module: MLP, y: torch.Tensor) -> torch.Tensor:
    """The feed-forward half of a layer behind its norm: [B, T, D]."""
    gate, value = module.gate_proj(y), module.up_proj(y)
    return module.down_proj(swiglu.silu_mul(gate.flatten(0, 1), value.flatten(0, 1)).view(gate.shape))


def last_norm(model: Llama2_, x: torch.Tensor) -> torch.Tensor:
    """What the host does behind its last layer."""
    return norm.rms_modulate(x.contiguous(), near(model.norm.weight, x), None, model.norm.eps)
