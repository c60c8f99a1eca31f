"""`rope.qk_norm_rope` in Triton: one program holds all heads of a token's q or k, checked by `rope`."""

import torch
import triton
import triton.language as tl


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr, q_ptr, k_ptr, scales_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, table_batch, tokens, heads, eps, bound,
    QUANTISE: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    image, token = row // tokens, row % tokens
    head, channel = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    mask = (head < heads)[:, None] & (channel < WIDTH)[None, :]
    source = qkv_ptr + (row * 3 + part) * heads * WIDTH + head[:, None] * WIDTH + channel[None, :]
    weight_ptr = q_weight_ptr
    target = q_ptr + image * q_batch + token * q_token + head[:, None].to(tl.int64) * q_head
    if part == 1:
        weight_ptr = k_weight_ptr
        target = k_ptr + image * k_batch + token * k_token + head[:, None].to(tl.int64) * k_head
    weight = tl.load(weight_ptr + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)
    pair = tl.arange(0, BLOCK // 2)
    entry = table_ptr + image * table_batch + token * WIDTH + 2 * pair
    cos = tl.load(entry, mask=pair < WIDTH // 2, other=0.0)[None, :]
    sin = tl.load(entry + 1, mask=pair < WIDTH // 2, other=0.0)[None, :]
    x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)[:, None] * weight[None, :]
    a, b = tl.split(tl.reshape(x, (HEADS, BLOCK // 2, 2)))
    x = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (HEADS, BLOCK))
    if QUANTISE:
        scale = tl.maximum(tl.max(tl.abs(weight)), 1e-12) * bound
        if row == 0:
            tl.store(scales_ptr + part, scale)
        x = x * (1.0 / scale)
    tl.store(target + channel[None, :], x.to(q_ptr.dtype.element_ty), mask=mask)


def qk_norm_rope(qkv, q_weight, k_weight, table, eps, out, scales):
    batch, tokens, _, heads, width = qkv.shape
    q, k = out
    with torch.cuda.device_of(qkv):
        _qk_norm_rope_kernel[(batch * tokens, 2)](
            qkv, q_weight, k_weight, table, q, k, scales,
            *q.stride()[:3], *k.stride()[:3], table.stride(0) if table.ndim == 4 else 0,
            tokens, heads, eps, width**0.5 / 448, QUANTISE=scales is not None, WIDTH=width,
            HEADS=triton.next_power_of_2(heads), BLOCK=triton.next_power_of_2(width), num_warps=8,
        )  # fmt: skip
