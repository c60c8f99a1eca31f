"""Attention without a causal mask, by whichever backend suits: out = softmax(q kᵀ / sqrt(D)) v for each head.

Every backend is a function (q, k, v, lengths) -> out with q [B, H, S, D], k and v [B, H, T, D] of one dtype, any
strides but a last of 1; lengths [B] integers on their device, or None: keys from lengths[b] on are not attended to (a
length of 0 gives zeros), but must be finite. out is [B, H, S, D]; where a backend can, it lies in memory as
[B, S, H, D], so that out.transpose(1, 2).flatten(2) is free. `sdpa` in fp32 is the reference.
"""

import time
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from . import attention_fp8
from .arguments import FLOATS, described
from .flash_attn import flash_attn, flash_attn_module
from .registry import (
    Backend,
    Registry,
    Request,
    has_gluon,
    has_tensor_descriptors,
    installed,
    lazily,
    no_refusal,
    triton_refusal,
    version,
)

ATTENTION = Registry("attention")
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class AttentionRequest(Request):
    """What attention backends decide by: q [batch, heads, tokens, head_dim], k and v with `keys` tokens."""

    dtype: torch.dtype
    batch: int
    heads: int
    tokens: int
    keys: int
    head_dim: int
    lengths: bool = False

    @property
    def key(self) -> str:
        sizes = f"{self.batch}x{self.heads}x{self.tokens}x{self.head_dim} on {self.keys} keys"
        packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "flash-attn"))
        return f"{super().key}, {packages}, {self.dtype}, {sizes}, lengths={self.lengths}"


def request(q, k, v, lengths=None) -> AttentionRequest:
    """The request that these tensors make. Raises ValueError when they are none."""
    fits = (
        q.ndim == 4 and k.ndim == 4 and v.shape == k.shape and (*q.shape[:2], q.shape[3]) == (*k.shape[:2], k.shape[3])
    )
    alike = q.dtype == k.dtype == v.dtype and q.dtype in FLOATS and q.device == k.device == v.device
    if not fits or not alike or any(tensor.stride(-1) != 1 for tensor in (q, k, v)):
        given = "; ".join(described(tensor) for tensor in (q, k, v))
        raise ValueError(
            f"q, k, v: expected [B, H, S, D], [B, H, T, D], [B, H, T, D] of one floating dtype on one device "
            f"with unit stride in D, got {given}"
        )
    if lengths is not None:
        integers = lengths.dtype in (torch.int32, torch.int64)
        if lengths.shape != q.shape[:1] or not integers or lengths.device != q.device:
            raise ValueError(
                f"lengths: expected [{q.shape[0]}] of int32 or int64 on {q.device}, got {described(lengths)}"
            )
    batch, heads, tokens, head_dim = q.shape
    return AttentionRequest(
        device=q.device, dtype=q.dtype, batch=batch, heads=heads, tokens=tokens, keys=k.shape[2], head_dim=head_dim,
        lengths=lengths is not None,
    )  # fmt: skip


def attention(q, k, v, lengths=None, backend="auto"):
    """softmax(q kᵀ / sqrt(D)) v by the backend of that name; "auto" takes the first exact one that fits.

    To choose by measurement, ask ATTENTION.choose(..., measure=timing(q, k, v)) once and keep its answer.
    """
    return ATTENTION.choose(backend, request(q, k, v, lengths)).function(q, k, v, lengths)


def timing(q, k, v, lengths=None, repeats=10):
    """A `measure` for ATTENTION.choose: seconds of a backend on these tensors, after a call that compiles it.

    Calls follow each other without waiting, as in a forward: what a launch costs is hidden behind the call before.
    """

    def measure(backend: Backend) -> float:
        backend.function(q, k, v, lengths)
        rounds = []
        for _ in range(3):
            _finish(q.device)
            started = time.perf_counter()
            for _ in range(repeats):
                backend.function(q, k, v, lengths)
            _finish(q.device)
            rounds.append((time.perf_counter() - started) / repeats)
        return min(rounds)

    return measure


def sdpa(q, k, v, lengths):
    """torch's own choice of kernel."""
    if lengths is None:
        return scaled_dot_product_attention(q, k, v)
    attended = torch.arange(k.shape[2], device=k.device) < lengths[:, None]
    out = scaled_dot_product_attention(q, k, v, attn_mask=attended[:, None, None])
    return out.masked_fill(
        (lengths == 0)[:, None, None, None], 0
    )  # torch's kernels differ where nothing is attended to


def cudnn(q, k, v, lengths):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v)


def flash(q, k, v, lengths):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v)


def _finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _half_precision_refusal(request, head_dim):
    """The common ground of the fast kernels: a GPU of compute capability 8.0, 16 bit, heads of at most head_dim."""
    if request.device.type != "cuda":
        return f"needs an NVIDIA GPU, the tensors are on {request.device.type}"
    if request.capability < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer, this one has {}.{}".format(*request.capability)
    if request.dtype not in HALVES:
        return f"takes bfloat16 and float16, got {request.dtype}"
    if request.head_dim > head_dim or request.head_dim % 8:
        return f"takes a head dimension of a multiple of 8 up to {head_dim}, got {request.head_dim}"
    return None


def _cudnn_refusal(request):
    if request.lengths:
        return "takes no lengths"
    return _half_precision_refusal(request, 128) or (
        None if torch.backends.cudnn.is_available() else "this torch is built without cuDNN"
    )


def _flash_refusal(request):
    if request.lengths:
        return "takes no lengths"
    return _half_precision_refusal(request, 256) or (
        None if torch.backends.cuda.is_flash_attention_available() else "needs a torch with flash attention"
    )


def _flash_attn_refusal(request):
    if request.lengths:
        return "takes no lengths"
    return _half_precision_refusal(request, 128) or (
        None if flash_attn_module(request.capability) else "needs the package flash-attn, not installed for this GPU"
    )


def _hopper_refusal(request):
    if request.lengths:
        return "takes no lengths"
    if not request.tokens or not request.keys:
        return "takes one token and one key at least"
    if request.head_dim != 128:
        return f"takes a head dimension of 128, got {request.head_dim}"
    reason = _half_precision_refusal(request, 128) or triton_refusal(request)
    if reason is not None:
        return reason
    if request.capability[0] != 9:
        return "is made for GPUs of compute capability 9.0 (Hopper), this one has {}.{}".format(*request.capability)
    return None if has_gluon() else f"needs Triton 3.6 or newer, here is {version('triton')}"


def _triton_refusal(request):
    if request.head_dim not in (16, 32, 64, 128):
        return f"takes a head dimension of 16, 32, 64 or 128, got {request.head_dim}"
    return _half_precision_refusal(request, 128) or triton_refusal(request)


def _triton_fp8_refusal(request):
    if request.device.type == "cuda" and installed("triton") and not has_tensor_descriptors():
        return f"needs Triton 3.4 or newer, here is {version('triton')}"
    if request.head_dim < 32:
        return f"takes a head dimension of 32, 64 or 128, got {request.head_dim}"
    return _triton_refusal(request) or triton_refusal(replace(request, quantise=True))


ATTENTION.register("hopper", lazily("attention_hopper_triton", "attention"), _hopper_refusal)
ATTENTION.register("cudnn", cudnn, _cudnn_refusal)
ATTENTION.register("flash-attn", flash_attn, _flash_attn_refusal)
ATTENTION.register("flash", flash, _flash_refusal)
ATTENTION.register("triton", lazily("attention_triton", "attention"), _triton_refusal)
# On Hopper sdpa is cuDNN or flash, by what ran first in the process (torch sets their order at the first call, the host
# around its own): measured as one of them, it could be the other, about half as fast, in the next.
ATTENTION.register("sdpa", sdpa, no_refusal, fallback=True)
# Rounding as FP8 does gives 0.053 on normal q, k, v of unit spread, and 0.1 where q and k have spread 2
ATTENTION.register("hopper-fp8", partial(attention_fp8.attention, "hopper-fp8"), _hopper_refusal, error=0.06)
ATTENTION.register("triton-fp8", partial(attention_fp8.attention, "triton-fp8"), _triton_fp8_refusal, error=0.06)
