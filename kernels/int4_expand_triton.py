"""int4.expand in Triton: a thread decodes whole groups, or halves. Arguments as `int4` has checked them."""

import torch
import triton
import triton.language as tl

from .int4_decode_triton import load_four, look_up, look_up_pairs, pack_words
from .int4_shapes import halves, table

BLOCK = 512  # groups a program


@triton.jit
def _expand_fp8_kernel(codes_ptr, groups_ptr, table_ptr, out_ptr, count, PTX: tl.constexpr, BLOCK: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = group < count
    codes = tl.load(codes_ptr + group, mask=mask, other=0)
    shape = tl.load(groups_ptr + group, mask=mask, other=0).to(tl.int32)
    t0, t1, t2, t3 = load_four(table_ptr + shape * 4, PTX)
    first, second = look_up(t0, t1, t2, t3, codes.to(tl.int32), PTX)
    third, fourth = look_up(t0, t1, t2, t3, (codes >> 32).to(tl.int32), PTX)
    eights = tl.join(pack_words(first, second), pack_words(third, fourth))
    place = group[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(out_ptr + place, eights, mask=mask[:, None])


@triton.jit
def _scaled_pair(pair, scale, BF16: tl.constexpr):
    """Both 16-bit numbers of an int32 times a power of two."""
    if BF16:  # by way of fp32 bits, exactly
        low = (pair << 16).to(tl.float32, bitcast=True) * scale
        high = (pair & -65536).to(tl.float32, bitcast=True) * scale
        low_bits = (low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
        return low_bits | (high.to(tl.int32, bitcast=True) & -65536)
    low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * scale
    high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * scale
    low_bits = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low_bits | (high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def _expand_pairs_kernel(
    codes_ptr, groups_ptr, scales_ptr, table_ptr, out_ptr, count, groups_in_row,
    BF16: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A program decodes half groups, 8 codes that become 16 bytes: what a thread stores at once.
    eight = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = eight < count
    group = eight // 2
    codes = tl.load(codes_ptr + eight, mask=mask, other=0)
    scale = tl.load(scales_ptr + group // groups_in_row, mask=mask, other=0.0)
    shape = tl.load(groups_ptr + group, mask=mask, other=0).to(tl.int32)
    h0, h1, h2, h3 = load_four(table_ptr + shape * 8, PTX)
    l0, l1, l2, l3 = load_four(table_ptr + shape * 8 + 4, PTX)
    first, second, third, fourth = look_up_pairs(h0, h1, h2, h3, l0, l1, l2, l3, codes, PTX)
    lower = pack_words(_scaled_pair(first, scale, BF16), _scaled_pair(second, scale, BF16))
    upper = pack_words(_scaled_pair(third, scale, BF16), _scaled_pair(fourth, scale, BF16))
    place = eight[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(out_ptr + place, tl.join(lower, upper), mask=mask[:, None])


def expand(codes, groups, scales, out):
    ptx = out.is_cuda
    with torch.cuda.device_of(out):
        if out.dtype == torch.float8_e4m3fn:
            count = groups.numel()
            _expand_fp8_kernel[(triton.cdiv(count, BLOCK),)](
                codes.view(torch.int64), groups, table(out.device).view(torch.int32),
                out.view(torch.uint8).view(torch.int64), count, PTX=ptx, BLOCK=BLOCK,
            )  # fmt: skip
        else:
            count = groups.numel() * 2
            _expand_pairs_kernel[(triton.cdiv(count, BLOCK),)](
                codes.view(torch.int32), groups, scales, halves(out.device, out.dtype).view(torch.int32),
                out.view(torch.int64), count, groups.shape[1],
                BF16=out.dtype == torch.bfloat16, PTX=ptx, BLOCK=BLOCK,
            )  # fmt: skip
    return out
