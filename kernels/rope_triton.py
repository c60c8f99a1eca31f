"""`rope.qk_norm_rope` in Triton: one program holds all heads of a token's q, k or v, checked by `rope`."""

import torch
import triton
import triton.language as tl


@triton.jit
def _head_pointers(ptr, image, token, head, channel, batch_stride, head_stride, token_stride):
    return (
        ptr + image * batch_stride + token * token_stride + head[:, None].to(tl.int64) * head_stride + channel[None, :]
    )


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, table_ptr, q_ptr, k_ptr, v_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, table_batch,
    tokens, heads, eps, WIDTH: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    image, token = row // tokens, row % tokens
    head, channel = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    mask = (head < heads)[:, None] & (channel < WIDTH)[None, :]
    source = qkv_ptr + (row * 3 + part) * heads * WIDTH + head[:, None] * WIDTH + channel[None, :]
    if part == 2:
        v = tl.load(source, mask=mask)
        tl.store(_head_pointers(v_ptr, image, token, head, channel, v_batch, v_head, v_token), v, mask=mask)
    else:
        if part == 0:
            weight = tl.load(q_weight_ptr + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)
        else:
            weight = tl.load(k_weight_ptr + channel, mask=channel < WIDTH, other=0.0).to(tl.float32)
        pair = tl.arange(0, BLOCK // 2)
        entry = table_ptr + image * table_batch + token * WIDTH + 2 * pair
        cos = tl.load(entry, mask=pair < WIDTH // 2, other=0.0)[None, :]
        sin = tl.load(entry + 1, mask=pair < WIDTH // 2, other=0.0)[None, :]
        x = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)[:, None] * weight[None, :]
        a, b = tl.split(tl.reshape(x, (HEADS, BLOCK // 2, 2)))
        x = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (HEADS, BLOCK))
        if part == 0:
            pointers = _head_pointers(q_ptr, image, token, head, channel, q_batch, q_head, q_token)
            tl.store(pointers, x.to(q_ptr.dtype.element_ty), mask=mask)
        else:
            pointers = _head_pointers(k_ptr, image, token, head, channel, k_batch, k_head, k_token)
            tl.store(pointers, x.to(k_ptr.dtype.element_ty), mask=mask)


def qk_norm_rope(qkv, q_weight, k_weight, table, eps, out):
    batch, tokens, _, heads, width = qkv.shape
    q, k = out[:2]
    v = out[2] if len(out) == 3 else q
    with torch.cuda.device_of(qkv):
        _qk_norm_rope_kernel[(batch * tokens, len(out))](
            qkv, q_weight, k_weight, table, q, k, v,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], table.stride(0) if table.ndim == 4 else 0,
            tokens, heads, eps, WIDTH=width, HEADS=triton.next_power_of_2(heads),
            BLOCK=triton.next_power_of_2(width), num_warps=8,
        )  # fmt: skip
