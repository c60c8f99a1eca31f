"""`rope_half.qk_norm_rope_half` in Triton: one program holds 8 heads of a token's q or k, checked by `rope_half`."""

import torch
import triton
import triton.language as tl

HEADS = 8


@triton.jit
def _turn_heads(
    x_ptr, weight_ptr, table_ptr, out_ptr, head, heads, head_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x_ptr, table_ptr and out_ptr stand at the token, head holds the numbers of some heads."""
    half: tl.constexpr = WIDTH // 2
    channel = tl.arange(0, BLOCK)
    inside = channel < half
    mask = (head < heads)[:, None] & inside[None, :]
    source = x_ptr + head[:, None].to(tl.int64) * head_stride + channel[None, :]
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    gain = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / WIDTH + eps)[:, None]
    a = a * gain * tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    b = b * gain * tl.load(weight_ptr + half + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos = tl.load(table_ptr + 2 * channel, mask=inside, other=0.0)[None, :]
    sin = tl.load(table_ptr + 2 * channel + 1, mask=inside, other=0.0)[None, :]
    target = out_ptr + head[:, None].to(tl.int64) * WIDTH + channel[None, :]
    tl.store(target, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(target + half, (a * sin + b * cos).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _qk_norm_rope_half_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, table_ptr, q_out_ptr, k_out_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, tokens, q_heads, k_heads, q_blocks, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    image, token = row // tokens, row % tokens
    table_ptr += token * WIDTH
    if block < q_blocks:
        _turn_heads(
            q_ptr + image * q_batch + token * q_token, q_weight_ptr, table_ptr, q_out_ptr + row * q_heads * WIDTH,
            block * HEADS + tl.arange(0, HEADS), q_heads, q_head, eps, WIDTH, BLOCK,
        )  # fmt: skip
    else:
        _turn_heads(
            k_ptr + image * k_batch + token * k_token, k_weight_ptr, table_ptr, k_out_ptr + row * k_heads * WIDTH,
            (block - q_blocks) * HEADS + tl.arange(0, HEADS), k_heads, k_head, eps, WIDTH, BLOCK,
        )  # fmt: skip


def qk_norm_rope_half(q, k, q_weight, k_weight, table, eps, out):
    batch, tokens, q_heads, width = q.shape
    k_heads = k.shape[2]
    q_blocks = triton.cdiv(q_heads, HEADS)
    with torch.cuda.device_of(q):
        _qk_norm_rope_half_kernel[(batch * tokens, q_blocks + triton.cdiv(k_heads, HEADS))](
            q, k, q_weight, k_weight, table, *out, *q.stride()[:3], *k.stride()[:3],
            tokens, q_heads, k_heads, q_blocks, eps,
            WIDTH=width, BLOCK=triton.next_power_of_2(width // 2), HEADS=HEADS, num_warps=4,
        )  # fmt: skip
