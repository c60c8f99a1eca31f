"""The INT4 kernels as a GPU gets them, compiled where there is none: their byte permutation is not interpreted."""

import json
import os
import re
import subprocess
import sys

import pytest

TILES_WEIGHTS = 64 * 128 // 128  # of a thread in a step
LANES_WEIGHTS = 2 * 16 * 128 // 32  # in a round of the loop and in the last, which not all warps have
EXPAND_WEIGHTS = 512 * 16 // 128
SCRIPT = """
import json, sys, types

package = types.ModuleType("zimage_turbo")
package.__path__ = [sys.argv[1]]
sys.modules["zimage_turbo"] = package
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zimage_turbo.kernels import int4_expand_triton, int4_lanes_triton, int4_slices_triton, int4_tiles_triton

capability = int(sys.argv[2])


def compiled(kernel, types, constants):
    names = kernel.arg_names
    types = dict(zip(names, types))
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_stages": 3, "num_warps": 4}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


kernels = {
    "expand": compiled(
        int4_expand_triton._expand_fp8_kernel, ["*i64", "*u8", "*i32", "*i64", "i32"], {"PTX": True, "BLOCK": 512}
    ),
}
early = {"EARLY": capability >= 90}
kernels["sum"] = compiled(
    int4_slices_triton._sum_slices_kernel,
    ["*fp32", "*fp32", "*bf16", "*bf16", "i32", "i32", "i32"],
    {"BIAS": True, "SLICES": 4, "BLOCK": 256, **early},
)
kernels["arrange"] = compiled(
    int4_tiles_triton._arrange_kernel, ["*i32", "*i32", "i32"], {"BLOCK": 512, **early}
)
constants = {"BIAS": True, "SPLIT": False, "PTX": True, **early}
for dtype in ("bf16", "fp16"):
    kernels["lanes " + dtype] = compiled(
        int4_lanes_triton._product_kernel,
        ["*i32", "*i32", "*i16", "*i32", "*fp32", "*" + dtype, "*" + dtype, "i32", "i32", "i32", "i32"],
        {**constants, "FP16": dtype == "fp16", "WARPS": 4},
    )
    for name, arranged in {"tiles": True, "arranging tiles": False}.items():
        kernels[f"{name} {dtype}"] = compiled(
            int4_tiles_triton._product_kernel,
            ["*" + dtype, "*i64", "*i64", "*i32", "*fp32", "*" + dtype, "*" + dtype, "i32", "i32", "i32", "i32"],
            {**constants, "FP16": dtype == "fp16", "BLOCK_N": 64, "BLOCK_M": 64, "ARRANGED": arranged},
        )
print(json.dumps(kernels))
"""


@pytest.fixture(scope="module", params=[80, 90], ids="sm_{}".format)
def ptx(request, pack):
    """(capability, PTX by kernel)"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, str(pack), str(request.param)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return request.param, json.loads(ran.stdout)


def test_expansion_permutes_by_instructions(ptx):
    """6 for 8 weights, and a thread reads a table row at once."""
    code = ptx[1]["expand"]
    assert code.count("prmt.b32") >= 6 * EXPAND_WEIGHTS // 8
    assert code.count("ld.global.nc.v4.b32") == EXPAND_WEIGHTS // 16


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_lanes_feed_the_tensor_core_themselves(ptx, dtype):
    """10 permutations for 8 weights and 4 shuffles for 16; shared memory is for the warps' sums at the end alone."""
    code = ptx[1][f"lanes {dtype}"]
    permutations = 10 * LANES_WEIGHTS // 8
    assert permutations <= code.count("prmt.b32") < 1.1 * permutations
    assert code.count("shfl.sync.idx") == 4 * LANES_WEIGHTS // 16
    products = code.split("mma.sync.aligned.m16n8k16.row.col.f32." + {"bf16": "bf16", "fp16": "f16"}[dtype])
    assert len(products) == 1 + LANES_WEIGHTS // 8 and "st.shared" not in "".join(products[:-1])


@pytest.mark.parametrize("name", ["tiles", "arranging tiles"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_tiles_are_decoded_where_the_tensor_core_reads_them(ptx, dtype, name):
    """10 permutations for 8 weights and 4 shuffles for 16; not moved, nor loaded from shared memory."""
    capability, kernels = ptx
    code = kernels[f"{name} {dtype}"]
    permutations = 10 * TILES_WEIGHTS // 8
    assert permutations <= code.count("prmt.b32") < 1.1 * permutations
    assert code.count("shfl.sync.idx") == 4 * TILES_WEIGHTS // 16
    if capability < 90:
        assert "mma.sync" in code
    else:
        assert code.count("wgmma.mma_async") == 8 and "ldmatrix" not in code


@pytest.mark.parametrize("kernel", ["lanes bf16", "arrange", "tiles bf16", "arranging tiles bf16", "sum"])
def test_waits_before_it_reads(ptx, kernel):
    """On Hopper a kernel starts while the one before it ends; an older GPU does not know the instruction.

    That one may write all but the table of shapes, the only thing that is read as a constant.
    """
    capability, kernels = ptx
    before, *after = kernels[kernel].split("griddepcontrol.wait")
    if capability < 90:
        assert not after
        return
    assert len(after) == 1 and not re.search(r"ld\.global(?!\.nc)|cp\.async|st\.global|st\.shared", before)
    assert kernels[kernel].count("ld.global.nc") == kernel.endswith("bf16")
    assert "griddepcontrol.launch_dependents" in after[0]
