"""Decoding INT4 groups in Triton by byte permutation: 4 codes choose 4 bytes at once from a group's 16 in registers.

The hardware's permutation chooses from 8 bytes by 3 bits a byte. Two of them choose from the two halves of 16 bytes, a
third between their results by the fourth bit of each code.

PTX: a GPU's instructions, which Triton's interpreter does not know, in place of plain arithmetic.
"""

import triton
import triton.language as tl


@triton.jit
def load_four(pointer, PTX: tl.constexpr):
    """Four neighbouring int32 of a constant table, 16-byte aligned.

    As an instruction it stays out of the software pipeline, which would copy the table through shared memory.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [pointer.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)


@triton.jit
def permute_bytes(low, high, selector, PTX: tl.constexpr):
    """int32 whose byte i is byte (bits 4i .. 4i + 2 of selector) of the eight in low and high; bits 4i + 3 are 0."""
    if PTX:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    eight = pack_words(low, high)
    selector = (selector + tl.zeros_like(low)).to(tl.int64)
    result = (eight >> ((selector & 7) * 8)) & 255
    for byte in tl.static_range(1, 4):
        chosen = (eight >> (((selector >> (4 * byte)) & 7) * 8)) & 255
        result = result | (chosen << (8 * byte))
    return result.to(tl.int32)


@triton.jit
def pack_words(low, high):
    """int64 of two int32."""
    return (low.to(tl.int64) & 0xFFFFFFFF) | (high.to(tl.int64) << 32)


@triton.jit
def _look_up_four(t0, t1, t2, t3, entry, half, PTX: tl.constexpr):
    lower = permute_bytes(t0, t1, entry, PTX)
    upper = permute_bytes(t2, t3, entry, PTX)
    return permute_bytes(lower, upper, half, PTX)


@triton.jit
def look_up(t0, t1, t2, t3, word, PTX: tl.constexpr):
    """The bytes that the 8 codes of an int32 choose from the 16 in t0 .. t3: two int32, in order of columns."""
    entry = word & 0x77777777
    half = ((word >> 1) & 0x44444444) | 0x32103210
    first = _look_up_four(t0, t1, t2, t3, entry, half, PTX)
    second = _look_up_four(t0, t1, t2, t3, entry >> 16, half >> 16, PTX)
    return first, second


@triton.jit
def look_up_pairs(h0, h1, h2, h3, l0, l1, l2, l3, word, PTX: tl.constexpr):
    """The 16-bit numbers that 8 codes choose, from their 16 high and low bytes (int4_shapes.halves).

    Four int32, each of two neighbouring columns.
    """
    high_0, high_1 = look_up(h0, h1, h2, h3, word, PTX)
    low_0, low_1 = look_up(l0, l1, l2, l3, word, PTX)
    return (
        permute_bytes(low_0, high_0, 0x5140, PTX),
        permute_bytes(low_0, high_0, 0x7362, PTX),
        permute_bytes(low_1, high_1, 0x5140, PTX),
        permute_bytes(low_1, high_1, 0x7362, PTX),
    )


@triton.jit
def load_lane_shape(table_ptr, OUTPUTS: tl.constexpr, PTX: tl.constexpr):
    """The shape whose index is the thread's lane, for from_lane: four int32 [OUTPUTS, 8], like codes and groups."""
    zeros = tl.zeros((OUTPUTS, 8), tl.int64)
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 lane; .reg .b64 at; mov.u32 lane, %laneid; mad.wide.u32 at, lane, 16, $4; "
            "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [at]; }",
            "=r,=r,=r,=r,l",
            [table_ptr.to(tl.int64) + zeros],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    unused = zeros.to(tl.int32)
    return unused, unused, unused, unused


@triton.jit
def from_lane(table_ptr, own, shape, PTX: tl.constexpr):
    """The four int32 of a shape, of which only the lower five bits count; `own`: those that the thread's lane holds."""
    return (
        _word_from_lane(table_ptr, own, shape, 0, PTX),
        _word_from_lane(table_ptr, own, shape, 1, PTX),
        _word_from_lane(table_ptr, own, shape, 2, PTX),
        _word_from_lane(table_ptr, own, shape, 3, PTX),
    )


@triton.jit
def _word_from_lane(table_ptr, own, shape, WORD: tl.constexpr, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=r,r,r", [own[WORD], shape], dtype=tl.int32, is_pure=True, pack=1
        )
    return tl.load(table_ptr + (shape & 31) * 4 + WORD)
