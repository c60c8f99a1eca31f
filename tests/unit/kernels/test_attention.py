"""Attention: each backend that this machine can run against the formula in float64, and why the others refuse."""

import os
import re
import subprocess
import sys

import pytest
import torch

from zimage_turbo.kernels import attention, attention_fp8, attention_triton, flash_attn, heads, registry
from zimage_turbo.kernels.attention import ATTENTION, AttentionRequest
from zimage_turbo.tests.unit.kernels.accuracy import GPU, error, normal, on_devices, poisoned, storable
from zimage_turbo.tests.unit.kernels.formula import decoded, decoded_values, exactly, formula

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# B, H, S, T, D
sizes = on_devices(
    cpu=[(1, 2, 33, 33, 64), (2, 1, 37, 75, 128), (1, 1, 5, 16, 64)],
    cuda=[(1, 2, 320, 320, 128), (2, 3, 1000, 777, 64), (1, 30, 4224, 4224, 128)],
)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
FP8_SCRIPT = """
import sys, types

package = types.ModuleType("zimage_turbo")
package.__path__ = [sys.argv[1]]
sys.modules["zimage_turbo"] = package
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from zimage_turbo.kernels import attention_fp8_triton as module

kernel, capability, block = module._attention_kernel, int(sys.argv[2]), module.BLOCK
constants = {"LENGTHS": False, "QUANTISE": False, "SHIFT": module.SHIFT, "ROUNDED": module.ROUNDED}
constants |= {"COMPUTE": tl.float8e4nv, "EXACT_FROM": module.exact_from(divmod(capability, 10))}
constants |= {"BLOCK": block, "WIDTH": 128}
types = {"q_ptr": "*fp8e4nv", "out_ptr": "*bf16", "scale": "fp32", "factor": "fp32", "lengths_ptr": "*i32"}
types |= {"k_desc": f"tensordesc<fp8e4nv[{block}, 128]>", "v_desc": f"tensordesc<fp8e4nv[128, {block}]>"}
types |= {name: "*fp32" for name in kernel.arg_names if name.endswith("scale_ptr")}
signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
made = triton.compile(
    ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", capability, 32),
    options={"num_warps": 4, "num_stages": 3},
)
print(made.asm["ttir"])
"""
requires_gpu = pytest.mark.skipif(not GPU, reason="no NVIDIA GPU")


def arguments(size, device, dtype, spread=2):
    """q and k of spread 2: a softmax far from even. All three laid out as the fused projection leaves them."""
    batch, heads, tokens, keys, width = size
    q, k, v = (
        normal(batch, number, heads, width, device=device, dtype=dtype, spread=spread).transpose(1, 2)
        for number, spread in ((tokens, spread), (keys, spread), (keys, 1))
    )
    return q, k, v


def working(device):
    """The dtype that the kernels compute in: fp32 in the interpreter, which cannot multiply bf16."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def blocks(device):
    """In the interpreter small blocks, so that small sizes take several; on a GPU the rule's."""
    return (16, 32, 4, 2) if device == "cpu" else None


def lengths_for(size, device):
    return torch.tensor([max(1, size[3] // (2 + row)) for row in range(size[0])], device=device)


@sizes
@dtypes
@pytest.mark.parametrize("ragged", [False, True], ids=["all-keys", "lengths"])
def test_triton(device, size, dtype, ragged):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the Triton kernel is for 16 bit on a GPU")
    q, k, v = arguments(size, device, dtype)
    lengths = lengths_for(size, device) if ragged else None
    out = poisoned(q.shape, storable(dtype, device), device)
    if ragged:
        for row, length in enumerate(lengths.tolist()):
            k[row, :, length:], v[row, :, length:] = float("nan"), float("nan")
    attention_triton.attention(q, k, v, lengths, blocks(device), out)
    if ragged:
        k, v = k.nan_to_num(), v.nan_to_num()
    exact = exactly(q, k, v, lengths)
    allowed = 2e-6 if dtype == torch.float32 else 2 * error(formula(q, k, v, lengths), exact)
    assert error(out, exact) <= allowed


@sizes
def test_large_scores_do_not_overflow(device, size):
    q, k, v = arguments(size, device, working(device))
    q = q * 300
    out = attention_triton.attention(q, k, v, None, blocks(device))
    # fp32 knows scores of some 5,000 to 3e-4; bf16 rounds weights and result to 2e-3
    assert error(out, exactly(q, k, v)) < (1e-3 if device == "cpu" else 6e-3)


@sizes
def test_a_length_of_zero_gives_zeros(device, size):
    q, k, v = arguments(size, device, working(device))
    lengths = torch.zeros(size[0], dtype=torch.int32, device=device)
    assert not attention_triton.attention(q, k, v, lengths, blocks(device)).any()
    assert not attention.sdpa(q, k, v, lengths).any()


@sizes
def test_output_lies_by_tokens(device, size):
    q, k, v = arguments(size, device, torch.float16)
    assert attention_triton.attention(q, k, v, None, blocks(device)).transpose(1, 2).is_contiguous()


@sizes
@pytest.mark.parametrize("ragged", [False, True], ids=["all-keys", "lengths"])
def test_attention_of_codes(device, size, ragged):
    """Against the formula on what the codes stand for: on a GPU the weights round to FP8 too, in the interpreter
    nothing does. Values grow tenfold along the keys, so that blocks have scales of their own."""
    q, k, v = arguments(size, device, working(device), spread=1)
    v = v * torch.logspace(-1, 0, size[3], device=device).to(v.dtype)[:, None]
    lengths = lengths_for(size, device) if ragged else None
    q, k = heads.quantise_heads(q, backend="torch"), heads.quantise_heads(k, backend="torch")
    out = poisoned(q[0].shape, v.dtype, device)
    attention_fp8.attention_of_codes("triton-fp8", q, k, v, lengths, out)
    v = heads.quantise_heads(v, transposed=True)  # as it was made inside: faulty in the interpreter
    exact = exactly(decoded(*q), decoded(*k), decoded_values(*v, size[3]), lengths)
    assert error(out, exact) <= (2e-6 if device == "cpu" else 0.04)


@sizes
def test_rows_of_codes(device, size):
    """What attention_of_codes gives, times the factor, in FP8; in the interpreter unrounded."""
    q, k, v = arguments(size, device, working(device), spread=1)
    batch, number, tokens, _, width = size
    q, k = heads.quantise_heads(q, backend="torch"), heads.quantise_heads(k, backend="torch")
    stored = torch.float32 if device == "cpu" else torch.float8_e4m3fn
    out = poisoned((batch, tokens, number, width), stored, device), poisoned((batch * tokens, 1), torch.float32, device)
    codes, scales = attention_fp8.rows_of_codes("triton-fp8", q, k, v, 0.5, out)
    assert codes.double().abs().max() <= 448
    values = codes.double() * scales.view(batch, tokens, 1, 1) * 2
    expected = attention_fp8.attention_of_codes("triton-fp8", q, k, v).transpose(1, 2)
    assert error(values, expected) <= (2e-6 if device == "cpu" else 0.03)


@requires_gpu
@pytest.mark.parametrize("name", ["hopper", "cudnn", "flash-attn", "flash", "triton", "sdpa", *attention_fp8.KERNELS])
@pytest.mark.parametrize("size", [(1, 30, 4224, 4224, 128), (2, 2, 333, 333, 128)], ids=["full", "odd"])
def test_every_backend_on_the_gpu(name, size):
    q, k, v = arguments(size, "cuda", torch.bfloat16, spread=1)
    reason = ATTENTION.refusals(attention.request(q, k, v))[name]
    if reason:
        pytest.skip(reason)
    exact = exactly(q, k, v)
    allowed = ATTENTION.backends[name].error or 2 * error(formula(q, k, v), exact)
    assert error(attention.attention(q, k, v, backend=name), exact) <= allowed


@requires_gpu
@pytest.mark.parametrize("name", attention_fp8.KERNELS)
def test_long_rows_of_fp8_products_are_added_up_exactly(name):
    """Values with a mean in common, over the keys of 2048x2048: sums that the tensor core keeps lose 16 % of it."""
    q, k, v = arguments((1, 2, 1000, 16448, 128), "cuda", torch.bfloat16, spread=1)
    reason = ATTENTION.refusals(attention.request(q, k, v))[name]
    if reason:
        pytest.skip(reason)
    v = v + 0.5
    assert error(attention.attention(q, k, v, backend=name), exactly(q, k, v)) < 0.01


@pytest.mark.parametrize("capability", [89, 90, 100, 120])
def test_blocks_of_keys_are_added_up_outside_of_fp8_products(pack, capability):
    """A compiler that finds a sum of something and a product takes that for the product's first sums."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", FP8_SCRIPT, str(pack), str(capability)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    products = re.findall(r"tt\.dot \S+, \S+, (%\w+)", ran.stdout)
    assert len(products) == 4 and all(sums.startswith("%cst") for sums in products)


@requires_gpu
@pytest.mark.parametrize("name", ["triton", *attention_fp8.KERNELS])
def test_triton_backends_replay_in_a_cuda_graph(name):
    q, k, v = arguments((1, 2, 333, 333, 128), "cuda", torch.bfloat16)
    reason = ATTENTION.refusals(attention.request(q, k, v))[name]
    if reason:
        pytest.skip(reason)
    run = ATTENTION.backends[name].function
    eager = run(q, k, v, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(q, k, v, None)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, eager)


def test_the_cpu_takes_sdpa_and_tells_why_not_the_others():
    q, k, v = arguments((2, 2, 33, 20, 64), "cpu", torch.float32)
    lengths = torch.tensor([20, 7])
    assert ATTENTION.choose("auto", attention.request(q, k, v)).name == "sdpa"
    assert error(attention.attention(q, k, v, lengths), exactly(q, k, v, lengths)) < 2e-6
    with pytest.raises(ValueError, match="cannot run this") as caught:
        attention.attention(q, k, v, backend="cudnn")
    for line in ("cudnn: needs an NVIDIA GPU", "triton: needs an NVIDIA GPU", "sdpa: can run"):
        assert line in str(caught.value)


@requires_gpu
@pytest.mark.parametrize("kernel", attention_fp8.KERNELS)
@pytest.mark.parametrize("keys", [4160, 4200])
def test_codes_in_a_cuda_graph(keys, kernel):
    """As the forward calls it: the norm and rotation put out codes, and what is replayed equals what was computed."""
    q, k = (heads.quantise_heads(normal(1, 30, keys, 128, device="cuda")) for _ in range(2))
    v = normal(1, keys, 3, 30, 128, device="cuda", dtype=torch.bfloat16)[:, :, 2].transpose(1, 2)
    reason = ATTENTION.refusals(attention.request(v, v, v))[kernel]
    if reason:
        pytest.skip(reason)

    def both():
        return attention_fp8.attention_of_codes(kernel, q, k, v), *attention_fp8.rows_of_codes(kernel, q, k, v, 1.0)

    eager = both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(now.float(), before.float()) for now, before in zip(captured, eager, strict=True))


def on_gpu(monkeypatch, capability, **changes):
    """A request as a GPU of that compute capability makes it; no GPU is needed to ask who would refuse it."""
    monkeypatch.setattr(registry, "_capability", lambda index: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(attention, "has_gluon", lambda: True)
    sizes = {"batch": 1, "heads": 30, "tokens": 4224, "keys": 4224, "head_dim": 128, "dtype": torch.bfloat16}
    return AttentionRequest(device=torch.device("cuda:0"), **{**sizes, **changes})


@pytest.mark.parametrize(
    ("capability", "changes", "chosen", "allowed_error"),
    [
        ((9, 0), {}, "hopper", 0.0),
        ((9, 0), {"head_dim": 64}, "cudnn", 0.0),
        ((10, 0), {}, "cudnn", 0.0),
        ((8, 0), {"head_dim": 160}, "flash", 0.0),
        ((9, 0), {"lengths": True}, "triton", 0.0),
        ((9, 0), {"dtype": torch.float32}, "sdpa", 0.1),
        ((7, 5), {"dtype": torch.float16}, "sdpa", 0.0),
        ((9, 0), {"head_dim": 100, "lengths": True}, "sdpa", 0.0),
    ],
)
def test_auto_by_capability(monkeypatch, capability, changes, chosen, allowed_error):
    asked = on_gpu(monkeypatch, capability, **changes)
    assert ATTENTION.choose("auto", asked, allowed_error=allowed_error).name == chosen


@pytest.mark.parametrize(
    ("capability", "changes", "reason"),
    [
        ((9, 0), {}, None),
        ((8, 9), {}, r"\(Hopper\), this one has 8.9"),
        ((10, 0), {}, r"\(Hopper\), this one has 10.0"),
        ((9, 0), {"head_dim": 64}, "takes a head dimension of 128, got 64"),
        ((9, 0), {"dtype": torch.float32}, "takes bfloat16 and float16"),
        ((9, 0), {"lengths": True}, "takes no lengths"),
        ((9, 0), {"tokens": 0}, "takes one token and one key at least"),
        ((9, 0), {"keys": 0}, "takes one token and one key at least"),
    ],
)
@pytest.mark.parametrize("name", ["hopper", "hopper-fp8"])
def test_what_the_kernels_for_hopper_refuse(monkeypatch, name, capability, changes, reason):
    found = ATTENTION.refusals(on_gpu(monkeypatch, capability, **changes))[name]
    assert found is None if reason is None else re.search(reason, found)


@pytest.mark.parametrize(
    ("version", "fits"), [("3.6.0", True), ("3.10.1+git1", True), ("4.0.0", True), ("3.5.1", False), ("3.0.0", False)]
)
def test_gluon_is_known_by_tritons_own_version(monkeypatch, version, fits):
    """Which the name of its package, as in nightly builds and on Windows, does not hide."""
    triton = pytest.importorskip("triton")
    asked = on_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(attention, "has_gluon", registry.has_gluon.__wrapped__)  # what it found is kept
    found = ATTENTION.refusals(asked)["hopper"]
    assert found is None if fits else found.startswith("needs Triton 3.6 or newer")


def test_fp8_is_measured_only_where_its_error_is_allowed(monkeypatch):
    asked = on_gpu(monkeypatch, (9, 0))

    def measure(backend):
        return {"hopper-fp8": 1.0, "triton": 2.0}.get(backend.name, 3.0)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert ATTENTION.choose("auto", asked, measure=measure).name == "triton"
    assert ATTENTION.choose("auto", asked, measure=measure, allowed_error=0.1).name == "hopper-fp8"
    assert ATTENTION.choose("triton-fp8", asked).name == "triton-fp8"
    with pytest.raises(ValueError, match=r"triton-fp8: needs for FP8 a GPU of compute capability 8\.9 .* has 8\.0"):
        ATTENTION.choose("triton-fp8", on_gpu(monkeypatch, (8, 0)))


@pytest.mark.parametrize(
    ("files", "capability", "module"),
    [
        ([], (9, 0), None),
        (["flash_attn/flash_attn_interface.py"], (9, 0), "flash_attn"),
        (["flash_attn/flash_attn_interface.py"], (7, 5), None),
        (["flash_attn/flash_attn_interface.py", "flash_attn/cute/__init__.py"], (9, 0), "flash_attn.cute"),
        (["flash_attn/flash_attn_interface.py", "flash_attn/cute/__init__.py"], (8, 0), "flash_attn"),
        (["flash_attn/cute/__init__.py", "flash_attn_interface.py"], (9, 0), "flash_attn_interface"),
        (["flash_attn/cute/__init__.py", "flash_attn_interface.py"], (10, 0), "flash_attn.cute"),
    ],
)
def test_flash_attn_is_found_without_an_import(tmp_path, monkeypatch, files, capability, module):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("raise ImportError('imported')\n")
    if "flash_attn/flash_attn_interface.py" in files:
        (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('imported')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for cached in (registry.installed, flash_attn.flash_attn_module):
        cached.cache_clear()
        monkeypatch.setattr(sys, "path_importer_cache", {})
    assert flash_attn.flash_attn_module(capability) == module
    for cached in (registry.installed, flash_attn.flash_attn_module):
        cached.cache_clear()


def test_flash_attn_is_called_in_its_own_layout(monkeypatch):
    """A stand-in for version 3 that checks [B, S, H, D] and returns a pair, as early builds did."""
    seen = []

    class Interface:
        @staticmethod
        def flash_attn_func(q, k, v):
            seen.append(q.shape)
            out = formula(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
            return out, None

    q, k, v = arguments((1, 2, 9, 9, 64), "cpu", torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash_attn, "flash_attn_module", lambda capability: "flash_attn_stand_in")
    monkeypatch.setitem(sys.modules, "flash_attn_stand_in", Interface)
    out = flash_attn.flash_attn(q, k, v, None)
    assert seen == [(1, 9, 2, 64)] and error(out, exactly(q, k, v)) < 2e-6


def test_timing_ranks_backends():
    q, k, v = arguments((1, 1, 8, 8, 64), "cpu", torch.float32)
    calls = []

    def function(q, k, v, lengths):
        calls.append(lengths)

    seconds = attention.timing(q, k, v, repeats=3)(registry.Backend("counted", function, registry.no_refusal))
    assert seconds >= 0 and calls == [None] * 10


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"q": torch.zeros(1, 2, 5)}, r"expected \[B, H, S, D\].* got \[1, 2, 5\]"),
        ({"k": torch.zeros(1, 3, 7, 64)}, "q, k, v: expected"),
        ({"v": torch.zeros(1, 2, 7, 64).half()}, "one floating dtype"),
        ({"q": torch.zeros(1, 2, 64, 5).transpose(2, 3)}, "unit stride in D"),
        ({"lengths": torch.ones(2, dtype=torch.int32)}, r"lengths: expected \[1\] of int32 or int64"),
        ({"lengths": torch.ones(1)}, "lengths: expected .* of float32"),
    ],
)
def test_refusals_name_what_was_given(change, complaint):
    given = {"q": torch.zeros(1, 2, 5, 64), "k": torch.zeros(1, 2, 7, 64), "v": torch.zeros(1, 2, 7, 64)}
    with pytest.raises(ValueError, match=complaint):
        attention.attention(**{**given, **change})
