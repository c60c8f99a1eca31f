"""The INT4 kernels as a GPU gets them, compiled where there is none: their byte permutation is not interpreted."""

import json
import os
import re
import subprocess
import sys

import pytest

PRODUCT_WEIGHTS = 64 * 128 // 128  # of a thread in a step
EXPAND_WEIGHTS = 512 * 16 // 128
SCRIPT = """
import json, sys, types

package = types.ModuleType("zimage_turbo")
package.__path__ = [sys.argv[1]]
sys.modules["zimage_turbo"] = package
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zimage_turbo.kernels import int4_expand_triton, int4_linear_triton, int4_terms_triton


def compiled(kernel, types, constants):
    names = kernel.arg_names
    types = dict(zip(names, types))
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in types}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", int(sys.argv[2]), 32), options={"num_stages": 3}).asm["ptx"]


kernels = {
    "product": compiled(
        int4_linear_triton._partial_products_kernel,
        ["*bf16", "*i64", "*i64", "*i32", "*fp32", "i32", "i32", "i32", "i32", "i32"],
        {"FP16": False, "PTX": True, "BLOCK_N": 64, "BLOCK_M": 16},
    ),
    "expand": compiled(
        int4_expand_triton._expand_fp8_kernel, ["*i64", "*u8", "*i32", "*i64", "i32"], {"PTX": True, "BLOCK": 512}
    ),
}
if sys.argv[2] == "90":
    pointers = ["*fp8e4nv", "*fp32", "*i64", "*i64", "*i32", "*fp32", "*fp32", "*fp32", "*i32", "*bf16"]
    constants = {"BIAS": True, "SPLIT": True, "PTX": True, "BLOCK_N": 64, "BLOCK_M": 16, "UNROLL": 1, "STAGES": 3}
    for lookup, overlap in (("load", False), ("shuffle", True)):
        kernels[lookup] = compiled(
            int4_terms_triton._product_kernel,
            [*pointers, "i32", "i32", "i32", "i32"],
            {**constants, "LOOKUP": lookup, "OVERLAP": overlap, "EVEN": not overlap},
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


def test_permutations_are_instructions(ptx):
    """For 8 weights a thread needs 16 in 16 bit and 6 in FP8, and reads a table row at once."""
    _, kernels = ptx
    assert kernels["product"].count("prmt.b32") >= 16 * PRODUCT_WEIGHTS // 8
    assert kernels["expand"].count("prmt.b32") >= 6 * EXPAND_WEIGHTS // 8
    assert kernels["product"].count("ld.global.nc.v4.b32") == 2 * PRODUCT_WEIGHTS // 16
    assert kernels["expand"].count("ld.global.nc.v4.b32") == EXPAND_WEIGHTS // 16


def test_decoded_weights_stay_in_registers(ptx):
    """On Hopper they are the tensor core's first operand as they are: not moved, nor loaded from shared memory."""
    capability, kernels = ptx
    if capability < 90:
        assert "mma.sync" in kernels["product"]
    else:
        assert "wgmma.mma_async" in kernels["product"] and "ldmatrix" not in kernels["product"]
        assert kernels["product"].count("prmt.b32") < 1.1 * 16 * PRODUCT_WEIGHTS // 8


@pytest.mark.parametrize("ptx", [90], indirect=True)
@pytest.mark.parametrize("lookup", ["load", "shuffle"])
def test_terms_meet_decoded_bytes_in_registers(ptx, lookup):
    """6 permutations for 8 weights and 4 for the drops of 16, then the tensor core, in two times 4 products."""
    code = ptx[1][lookup]
    permutations = 6 * PRODUCT_WEIGHTS // 8 + (4 * PRODUCT_WEIGHTS // 16 if lookup == "shuffle" else 0)
    assert permutations <= code.count("prmt.b32") < 1.1 * permutations
    assert len(re.findall(r"wgmma.mma_async\S+e4m3.e4m3", code)) == 8
    assert "ldmatrix" not in code and "st.shared" not in code.split("wgmma.mma_async")[0]
    assert ("shfl.sync.idx" in code, "griddepcontrol.wait" in code) == (lookup == "shuffle", lookup == "shuffle")
