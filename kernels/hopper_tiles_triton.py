"""What attention on Hopper is made of, in Gluon, the form of Triton in which a kernel places its warps.

A multiprocessor has one program, which goes from tile to tile. One warp has the copy engine bring what a tile needs,
groups of four warps multiply, each for a unit of ROWS queries. A tile has at most as many units as there are groups,
and fewer where programs have turns left.

Each buffer has two barriers: `full` is met when its bytes have come, `empty` when all who read it are done. How often a
buffer was used tells which phase of its barriers to wait for.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

WIDTH = gl.constexpr(128)  # channels of a head
GROUPS = gl.constexpr(3)  # of warps that multiply
ROWS = gl.constexpr(64)  # queries of a group
KEYS = gl.constexpr(128)  # of a block
REGISTERS = gl.constexpr((160, 160, 24))  # of a thread: in groups two and three, in what loads; group one has the rest


@gluon.jit
def make_barriers(STAGES: gl.constexpr):
    """`full` and `empty` of queries, of keys and of values."""
    return (
        _barriers(GROUPS, 1), _barriers(GROUPS, 1),
        _barriers(STAGES, 1), _barriers(STAGES, GROUPS),
        _barriers(STAGES, 1), _barriers(STAGES, GROUPS),
    )  # fmt: skip


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def count_turns(tiles, programs):
    """Tiles of this program."""
    return gl.cdiv(tiles - gl.program_id(0), programs)


@gluon.jit
def find_tile(turn, tiles, queries, programs):
    """Of this program's tile in that turn the head, its first unit, and how many units it has."""
    tile, units = gl.program_id(0) + turn * programs, gl.cdiv(queries, ROWS)
    first = tile % tiles * units // tiles
    return tile // tiles, first, (tile % tiles + 1) * units // tiles - first


@gluon.jit
def pass_tile(barriers, keys, turn, count, GROUP: gl.constexpr):
    """A tile without a unit for this group, which lets its keys and values go by: the blocks until then."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    mbarrier.wait(q_full.index(GROUP), turn & 1)
    mbarrier.arrive(q_empty.index(GROUP))
    for _ in range(gl.cdiv(keys, KEYS)):
        mbarrier.arrive(k_empty.index(wait_full(k_full, count)))
        mbarrier.arrive(v_empty.index(wait_full(v_full, count)))
        count += 1
    return count


@gluon.jit
def load_queries(desc, row, column, buffers, full, empty, turn):
    """The queries of all groups, from that row on."""
    for group in gl.static_range(GROUPS):
        mbarrier.wait(empty.index(group), (turn & 1) ^ 1)
        mbarrier.expect(full.index(group), desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [row + group * ROWS, column], full.index(group), buffers.index(group))


@gluon.jit
def load_block(desc, row, column, buffers, full, empty, count):
    STAGES: gl.constexpr = buffers.shape[0]
    stage = count % STAGES
    mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, column], full.index(stage), buffers.index(stage))


@gluon.jit
def wait_full(full, count):
    """The place of a block before which so many have come."""
    STAGES: gl.constexpr = full.shape[0]
    stage = count % STAGES
    mbarrier.wait(full.index(stage), count // STAGES & 1)
    return stage


@gluon.jit
def multiply_keys(q, ks, full, empty, count, LAYOUT: gl.constexpr):
    """q Kᵀ of a block, [ROWS, KEYS] in fp32."""
    stage = wait_full(full, count)
    scores = gl.zeros((ROWS, KEYS), gl.float32, LAYOUT)
    scores = warpgroup_mma(q, ks.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(empty.index(stage))
    return scores


@gluon.jit
def store_unit(desc, buffer, rows, head, unit):
    """Rows of a head; the copy engine writes them while the next unit is computed."""
    tma.store_wait(0)  # of the unit before
    buffer.store(rows.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [unit * ROWS, head * WIDTH], buffer)


@gluon.jit
def of_rows(vector, matrix):
    """A number for each row, as a column in the layout of a matrix."""
    return gl.convert_layout(vector, gl.SliceLayout(1, matrix.type.layout))[:, None]


@gluon.jit
def by_threads(x):
    """[ROWS, columns / 8, 4, 2]: by the four threads of a row, each with two neighbouring columns of eight.

    What is reduced over the others of these costs no exchange between threads.
    """
    columns: gl.constexpr = x.shape[1]
    return x.reshape((ROWS, columns // 8, 4, 2))


@gluon.jit
def sums_of_threads(x):
    """[ROWS, 4]"""
    return gl.sum(gl.sum(by_threads(x), axis=3), axis=1)


def layout(bits):
    """Of tiles in shared memory whose rows have 128 bytes or twice that."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)


def described(matrix, box):
    """`matrix`, rows of any distance, for the copy engine: boxes of so many rows and columns."""
    bits = 8 * matrix.element_size()
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], list(box), layout(bits))


def share_out(queries: int, heads: int, multiprocessors: int) -> tuple[int, int]:
    """(tiles a head, programs): of tiles as many as take no more turns than the fewest would."""
    units = triton.cdiv(queries, ROWS.value)
    turns = triton.cdiv(triton.cdiv(units, GROUPS.value) * heads, multiprocessors)
    tiles = min(units, turns * multiprocessors // heads)
    return tiles, min(tiles * heads, multiprocessors)


def multiprocessors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
