"""SwiGLU of two linears in one kernel: its arithmetic in the interpreter, its instructions as compiled for Hopper."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from zimage_turbo.kernels import fp8, registry, swiglu, swiglu_linear, swiglu_linear_triton
from zimage_turbo.kernels.arguments import FP8
from zimage_turbo.kernels.swiglu_linear import SWIGLU_LINEAR, SWIGLU_LINEAR_FP8, TwoWeightsRequest
from zimage_turbo.tests.unit.kernels import accuracy
from zimage_turbo.tests.unit.kernels.accuracy import error, normal, on_devices

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# rows, columns, outputs: multiples of the tile, and no multiples of anything but 8
sizes = on_devices(
    cpu=[(128, 64, 128), (1, 72, 264), (130, 200, 136)], cuda=[(4160, 3840, 10240), (1025, 3848, 1032), (2304, 64, 16)]
)
dtypes = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES.keys())
HOPPER = TwoWeightsRequest(
    torch.device("cuda", 0), dtype=torch.bfloat16, rows=4160, outputs=10240, columns=3840, distance=1 << 20
)
SCRIPT = """
import json, sys, types

package = types.ModuleType("zimage_turbo")
package.__path__ = [sys.argv[1]]
sys.modules["zimage_turbo"] = package
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zimage_turbo.kernels import swiglu_linear_triton as module

kernel, quantised = module._swiglu_linear_kernel, sys.argv[2] == "fp8e4nv"
step = module.STEP // (1 if quantised else 2)
constants = {"SCALED": quantised, "TENSOR_CORES": True, "GROUP": module.GROUP}
constants |= {"BLOCK_M": module.ROWS, "BLOCK_N": module.OUTPUTS, "BLOCK_K": step}
x = f"tensordesc<{sys.argv[2]}[{module.ROWS}, {step}]>"
weights = f"tensordesc<{sys.argv[2]}[2, {module.OUTPUTS}, {step}]>"
y = f"tensordesc<bf16[{module.ROWS}, {module.OUTPUTS}]>"
types = dict(zip(kernel.arg_names, [x, weights, y, *3 * ["*fp32"], *5 * ["i32"], "fp32"]))
signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
options = {"num_warps": 8, "num_stages": 3}
made = triton.compile(
    ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", 90, 32), options=options
)
print(json.dumps([made.asm["ptx"], made.metadata.shared]))
"""


def operands(size, dtype, device):
    """x and the two weights: the second begins behind the first, with rows between them that belong to neither."""
    rows, columns, outputs = size
    both = normal(2 * outputs + 3, columns, device=device, dtype=dtype, spread=columns**-0.5)
    return normal(rows, columns, device=device, dtype=dtype, spread=2), both[:outputs], both[outputs + 3 :]


def eager(x, gate_weight, value_weight):
    """As the host composes it, every step rounded to the dtype."""
    gate, value = (torch.nn.functional.linear(x, weight) for weight in (gate_weight, value_weight))
    return torch.nn.functional.silu(gate) * value


@sizes
@dtypes
@pytest.mark.parametrize("value_first", [False, True], ids=["gate-first", "value-first"])
def test_within_the_error_of_two_linears(device, size, dtype, value_first):
    x, first, second = operands(size, dtype, device)
    weights = (second, first) if value_first else (first, second)
    exact = eager(x.double(), *(weight.double() for weight in weights))
    # The interpreter truncates bf16 at a store: one unit in the last place, not half of one.
    allowed = (2 if device == "cuda" else 4) * error(eager(x, *weights), exact)
    assert error(swiglu_linear_triton.linear(x, *weights, 1.0), exact) <= allowed
    assert error(swiglu_linear.linear(x, *weights, backend="apart"), exact) <= 2 * error(eager(x, *weights), exact)


@sizes
def test_a_factor_keeps_fp16_finite(device, size):
    """Gates and values of about 1000, whose products fp16 holds only scaled."""
    x, gate, value = operands(size, torch.float16, device)
    x, gate, value = x.abs() * (100 * size[1] ** -0.5), gate.abs() * 8, value.abs() * 8
    exact = eager(x.double(), gate.double(), value.double()) / 128
    assert exact.max() * 128 > 65504
    y = swiglu_linear_triton.linear(x, gate, value, 2.0**-7)
    assert torch.isfinite(y).all() and error(y, exact) < 1e-3


def in_fp8(tensor):
    """(codes, row scales) and the numbers that they stand for, in float64."""
    codes, scales = fp8.quantise_rows(tensor)
    return (codes, scales), accuracy.dequantised(codes, scales)


@on_devices(cpu=[(128, 128, 128), (1, 144, 272), (130, 208, 144)], cuda=[(4160, 3840, 10240), (1025, 3856, 1040)])
@pytest.mark.parametrize("value_first", [False, True], ids=["gate-first", "value-first"])
@pytest.mark.parametrize("factor", [1.0, 2.0**-7])
def test_fp8_rows_of_fp8_rows(device, size, value_first, factor):
    """Within the error of two products and the gate behind them, and with the same largest values."""
    scaled, exact = zip(*map(in_fp8, operands(size, torch.float32, device)), strict=True)
    if value_first:
        scaled, exact = [scaled[i] for i in (0, 2, 1)], [exact[i] for i in (0, 2, 1)]
    x, *weights = [(codes, scales if i == 0 else scales.view(-1)) for i, (codes, scales) in enumerate(scaled)]
    exact = eager(*exact) * factor
    ours = swiglu_linear_triton.linear_fp8(x, *weights, factor, torch.bfloat16)
    apart = swiglu_linear.linear_fp8(x, *weights, factor, backend="apart")
    assert ours[0].dtype == FP8 and ours[1].shape == (size[0], 1)
    assert error(accuracy.dequantised(*ours), exact) <= 1.1 * error(accuracy.dequantised(*apart), exact) < 0.04
    assert error(ours[1], apart[1]) < 0.01


@on_devices(cpu=[(517, 8, 264)], cuda=[])
def test_every_tile_is_taken(device, size, monkeypatch):
    """Five rows of three tiles, in a group of three and one of two."""
    monkeypatch.setattr(swiglu_linear_triton, "GROUP", 4)
    x, *weights = operands(size, torch.float16, device)
    exact = eager(x.double(), *(weight.double() for weight in weights))
    assert error(swiglu_linear_triton.linear(x, *weights, 1.0), exact) < 1e-3


@pytest.mark.parametrize(("dtype", "product"), [("bf16", "m64n256k16"), ("fp8e4nv", "m64n256k32")])
def test_hopper_gets_its_widest_product_straight_from_the_copy_engine(pack, dtype, product):
    """Both weights are one operand of 256 columns: 4 products a step, and nothing is moved between two memories."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, str(pack), dtype]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    ptx, shared = json.loads(ran.stdout)
    assert ptx.count("wgmma.mma_async") == ptx.count(product) == 4
    assert "ld.shared" not in ptx and "cp.async.bulk.tensor.3d" in ptx
    assert shared <= 227 * 1024


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(registry, "installed", lambda package: True)
    monkeypatch.setattr(registry, "_capability", lambda index: (9, 0))


def test_hopper_takes_the_fused_kernel(hopper):
    assert SWIGLU_LINEAR.choose("auto", HOPPER).name == "fused"
    assert SWIGLU_LINEAR_FP8.choose("auto", replace(HOPPER, quantise=True)).name == "fused"


@pytest.mark.parametrize("op", [swiglu.SILU_MUL, fp8.FP8_LINEAR], ids=lambda op: op.op)
def test_a_users_own_part_is_not_passed_by(hopper, monkeypatch, op):
    monkeypatch.setattr(op, "backends", dict(op.backends))
    op.register("mine", print, lambda request: None, preferred=True)
    request = replace(HOPPER, quantise=True)
    assert SWIGLU_LINEAR_FP8.choose("auto", request).name == "apart"
    with pytest.raises(ValueError, match=f"{op.op} is left to another backend"):
        SWIGLU_LINEAR_FP8.choose("fused", request)
    assert SWIGLU_LINEAR.choose("auto", HOPPER).name == ("apart" if op is swiglu.SILU_MUL else "fused")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rows": 1023}, "takes 1024 rows or more, got 1023"),
        ({"dtype": torch.float32}, "takes bfloat16 and float16, got float32"),
        ({"columns": 3844}, "multiples of 8, got K = 3844, F = 10240"),
        ({"columns": 3848, "quantise": True}, "multiples of 16, got K = 3848, F = 10240"),
        ({"outputs": 10244}, "multiples of 8, got K = 3840, F = 10244"),
        ({"distance": 0}, r"less than 2\*\*40 bytes from each other, got 0"),
        ({"distance": 1 << 40}, r"from each other, got 1099511627776"),
        ({"aligned": False}, "begin at multiples of 16 bytes"),
    ],
)
def test_what_it_cannot_take_goes_to_two_linears(hopper, change, reason):
    request = replace(HOPPER, **change)
    op = SWIGLU_LINEAR_FP8 if request.quantise else SWIGLU_LINEAR
    assert op.choose("auto", request).name == "apart"
    with pytest.raises(ValueError, match=reason):
        op.choose("fused", request)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_take_two_linears(hopper, monkeypatch, capability):
    monkeypatch.setattr(registry, "_capability", lambda index: capability)
    assert SWIGLU_LINEAR.choose("auto", HOPPER).name == "apart"
    with pytest.raises(ValueError, match="compute capability 9.0 .*this one has {}.{}".format(*capability)):
        SWIGLU_LINEAR.choose("fused", HOPPER)


def test_an_older_triton_is_named(hopper, monkeypatch):
    monkeypatch.setattr(swiglu_linear, "has_tensor_descriptors", lambda: False)
    with pytest.raises(ValueError, match=r"needs Triton 3\.4 or newer, here is "):
        SWIGLU_LINEAR.choose("fused", HOPPER)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(3)}, r"x to be a contiguous \[M, K\].* got \[3\]"),
        ({"x": torch.zeros(64, 3).T}, r"x to be a contiguous \[M, K\]"),
        ({"x": torch.zeros(3, 64, dtype=torch.float64)}, r"\[M, K\] of bfloat16, float16, float32"),
        ({"gate_weight": torch.zeros(5, 63)}, r"gate_weight to be \[5, 64\], like x, got \[5, 63\]"),
        ({"value_weight": torch.zeros(6, 64)}, r"value_weight to be \[5, 64\], like x, got \[6, 64\]"),
        ({"value_weight": torch.zeros(5, 64).half()}, "value_weight .*like x, got .*float16"),
        ({"factor": 3.0}, "factor: expected a power of two"),
    ],
)
def test_refusals_name_what_was_given(change, complaint):
    given = {"x": torch.zeros(3, 64), "gate_weight": torch.zeros(5, 64), "value_weight": torch.zeros(5, 64)}
    with pytest.raises(ValueError, match=complaint):
        swiglu_linear.linear(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": (torch.zeros(3, 64), torch.ones(3, 1))}, r"x to be a contiguous \[M, K\] of float8_e4m3fn"),
        ({"x": (torch.zeros(3, 64).to(FP8), torch.ones(3))}, r"the scales of x to be a contiguous \[3, 1\]"),
        ({"gate_weight": (torch.zeros(5, 64).to(FP8), torch.ones(1))}, r"the scales of gate_weight .*\[5\]"),
        ({"value_weight": (torch.zeros(5, 64).to(FP8), torch.ones(5).double())}, "scales of value_weight .*float32"),
        ({"value_weight": (torch.zeros(5, 64).to(FP8), torch.ones(10)[::2])}, "scales of value_weight .*contiguous"),
        ({"dtype": torch.int8}, "dtype bfloat16, float16 or float32, got torch.int8"),
        ({"factor": 3.0}, "factor: expected a power of two"),
    ],
)
def test_refusals_of_scales_name_what_was_given(change, complaint):
    weight = torch.zeros(5, 64).to(FP8), torch.ones(5)
    given = {"x": (torch.zeros(3, 64).to(FP8), torch.ones(3, 1)), "gate_weight": weight, "value_weight": weight}
    with pytest.raises(ValueError, match=complaint):
        swiglu_linear.linear_fp8(**{**given, **change})


def test_what_begins_in_between_is_seen():
    """Tensors of which one does not begin at a multiple of 16 bytes."""
    seen = []
    backend = replace(SWIGLU_LINEAR.backends["apart"], refusal=lambda request: seen.append(request.aligned))
    weights = torch.zeros(2 * 5 * 64 + 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SWIGLU_LINEAR, "backends", {"apart": backend})
        for first in (0, 2):
            gate, value = weights[first : first + 640].view(2, 5, 64)
            swiglu_linear.linear(torch.zeros(3, 64), gate, value)
    assert seen == [True, False]
