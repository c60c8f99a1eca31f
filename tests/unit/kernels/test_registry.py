"""Choosing a backend by name, by preference, by measurement; the reasons; a backend of a user's own."""

import ast
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from zimage_turbo.kernels import attention, fp8, hadamard, norm, registry, residual, rope, swiglu
from zimage_turbo.kernels.registry import (
    Choices,
    Registry,
    Request,
    lazily,
    no_refusal,
    product_request,
    triton_refusal,
    weight_request,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


@dataclass(frozen=True)
class Size(Request):
    number: int = 0

    @property
    def key(self):
        return f"number {self.number}"


def small_only(request):
    return None if request.number < 10 else f"takes numbers below 10, got {request.number}"


@pytest.fixture
def op():
    op = Registry("double")
    op.register("small", lambda number: ("small", 2 * number), small_only)
    op.register("rough", lambda number: ("rough", 2 * number), no_refusal, error=0.1)
    op.register("any", lambda number: ("any", 2 * number), no_refusal)
    return op


def size(number):
    return Size(torch.device("cpu"), number=number)


def test_auto_takes_the_first_that_fits_and_is_exact(op):
    assert op.choose("auto", size(3)).function(3) == ("small", 6)
    assert op.choose("auto", size(30)).name == "any"
    assert op.choose("auto", size(30), allowed_error=0.1).name == "rough"


def test_a_named_backend_runs_or_every_reason_is_told(op):
    assert op.choose("rough", size(30)).name == "rough"
    with pytest.raises(ValueError) as caught:
        op.choose("small", size(30))
    assert str(caught.value).splitlines() == [
        "double: backend 'small' cannot run this. The backends:",
        "  small: takes numbers below 10, got 30",
        "  rough: can run",
        "  any: can run",
    ]
    with pytest.raises(ValueError, match="backend 'best' is not a known backend"):
        op.choose("best", size(3))


def test_auto_tells_every_reason_when_nothing_fits():
    op = Registry("double")
    op.register("small", abs, small_only)
    op.register("rough", abs, no_refusal, error=0.1)
    for measure in (None, lambda backend: 1.0):
        with pytest.raises(ValueError) as caught:
            op.choose("auto", size(30), measure=measure)
        assert "small: takes numbers below 10, got 30" in str(caught.value)
        assert "rough: its relative error of 0.1 is above the 0.0 allowed" in str(caught.value)


def test_a_preferred_backend_comes_first(op):
    op.register("mine", abs, small_only, preferred=True)
    assert list(op.backends) == ["mine", "small", "rough", "any"]
    assert op.choose("auto", size(3)).name == "mine"
    assert op.choose("auto", size(30)).name == "any"


def test_auto_asks_no_more_backends_than_it_needs(op):
    op.register("unasked", abs, lambda request: pytest.fail("asked"))
    assert op.choose("auto", size(30)).name == "any"


def test_a_lazy_function_is_imported_when_it_is_called():
    missing = lazily("no_such_module", "function")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        missing()
    assert lazily("int4_shapes", "levels")(CPU).shape == (32, 16)


def test_a_gpu_is_asked_for_its_capability_once(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or (8, index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 6)
    registry._capability.cache_clear()
    for name, expected in {"cuda:0": (8, 0), "cuda:6": (8, 6), "cuda": (8, 6), "cpu": (0, 0)}.items():
        assert Request(torch.device(name)).capability == Request(torch.device(name)).capability == expected
    registry._capability.cache_clear()
    assert asked == [0, 6]


def test_a_request_for_a_product_tells_its_sizes():
    asked = product_request(CPU, BF16, rows=3, outputs=20, columns=48)
    assert (asked.rows, asked.outputs, asked.columns, asked.dtype) == (3, 20, 48, BF16)
    assert asked.key == "cpu, quantise=False, torch.bfloat16, 20x48, 3 rows"
    assert weight_request(CPU, FP8, 20, 48).key == "cpu, quantise=False, torch.float8_e4m3fn, 20x48"


def test_a_taken_name_is_refused(op):
    for name in ("any", "auto"):
        with pytest.raises(ValueError, match=f"the backend name '{name}' is taken; taken are auto, small, rough, any"):
            op.register(name, abs, no_refusal)


def test_the_fastest_is_measured_once_per_request_and_remembered(op):
    measured, choices = [], Choices()

    def measure(backend):
        measured.append(backend.name)
        return {"small": 2.0, "rough": 0.5, "any": 1.0}[backend.name]

    assert op.choose("auto", size(3), measure=measure, choices=choices).name == "any"
    assert measured == ["small", "any"]
    restored = Choices.from_json(choices.to_json())
    assert op.choose("auto", size(3), measure=measure, choices=restored).name == "any"
    assert measured == ["small", "any"]
    assert op.choose("auto", size(4), measure=measure, choices=restored, allowed_error=1.0).name == "rough"
    assert measured == ["small", "any", "small", "rough", "any"]
    op.register("new", abs, no_refusal)
    with pytest.raises(KeyError, match="new"):  # it is measured, since the candidates have changed
        op.choose("auto", size(3), measure=measure, choices=restored)


def test_a_fallback_is_measured_only_where_nothing_else_runs(op):
    op.register("whatever", abs, no_refusal, fallback=True)
    op.register("either", abs, small_only, fallback=True)
    op.register("late", abs, small_only)
    seconds, measured = {"small": 3.0, "any": 2.0, "late": 2.5, "whatever": 1.0, "either": 0.5}, []

    def chosen(request):
        measured.clear()
        return op.choose("auto", request, measure=lambda each: measured.append(each.name) or seconds[each.name]).name

    assert chosen(size(3)) == "any" and measured == ["small", "any", "late"]
    assert op.choose("whatever", size(3)).name == "whatever"
    seconds |= dict.fromkeys(("small", "any", "late"), float("inf"))
    assert chosen(size(3)) == "either"
    assert chosen(size(30)) == "whatever" and measured == ["any", "whatever"], "a lone one that fails is not taken"
    del op.backends["any"]
    assert op.choose("auto", size(30)).name == "whatever"
    assert op.choose("auto", size(3)).name == "small"
    del op.backends["small"]
    assert op.choose("auto", size(3)).name == "late", "registered after the fallbacks"


def test_what_torch_chooses_is_not_measured_beside_its_choices():
    """By which kernel torch's own choice attends depends on what ran before in the process."""
    assert [each.name for each in attention.ATTENTION.backends.values() if each.fallback] == ["sdpa"]


def test_a_remembered_name_that_is_gone_is_measured_again(op):
    choices = Choices()
    op.choose("auto", size(3), measure=lambda backend: 1.0, choices=choices)
    stale = Choices(dict.fromkeys(choices.names, "removed"))
    assert op.choose("auto", size(3), measure=lambda backend: 1.0, choices=stale).name == "small"
    assert stale.names == choices.names


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', "3"])
def test_choices_of_another_shape_are_refused(text):
    with pytest.raises(ValueError, match="measured choices: expected a JSON object of strings"):
        Choices.from_json(text)
    assert json.loads(Choices({"b": "x", "a": "y"}).to_json()) == {"a": "y", "b": "x"}


def test_a_user_adds_an_attention_backend(monkeypatch):
    """As the module's docstring shows it, on a copy of the table."""
    monkeypatch.setattr(attention.ATTENTION, "backends", dict(attention.ATTENTION.backends))

    def mine(q, k, v, lengths):
        return v.mean(2, keepdim=True).expand_as(q)

    attention.ATTENTION.register("mine", mine, lambda request: None if request.head_dim == 8 else "needs 8", error=0.5)
    q = torch.zeros(1, 2, 3, 8)
    assert torch.equal(attention.attention(q, q, q + 1, backend="mine"), q + 1)
    assert attention.ATTENTION.choose("auto", attention.request(q, q, q)).name == "sdpa"
    with pytest.raises(ValueError, match="mine: needs 8"):
        attention.attention(*[torch.zeros(1, 2, 3, 16)] * 3, backend="mine")


OPS = [
    norm.RMS_MODULATE,
    norm.RESIDUAL_RMS_MODULATE,
    norm.RESIDUAL_RMS_MODULATE_OF_SUMS,
    norm.LAYER_MODULATE,
    residual.RESIDUAL_ADD,
    rope.QK_NORM_ROPE,
    swiglu.SILU_MUL,
    fp8.QUANTISE_ROWS,
    hadamard.HADAMARD_QUANTISE_ROWS,
]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.op)
def test_the_fused_ops_prefer_triton_where_it_runs(op, monkeypatch):
    monkeypatch.setattr(registry, "installed", lambda package: True)
    monkeypatch.setattr(registry, "_capability", lambda index: (7, 5))
    assert op.choose("auto", Request(GPU)).name == "triton"
    assert op.choose("auto", Request(GPU, quantise=True)).name == "torch"
    assert op.choose("auto", Request(CPU)).name == "torch"
    assert "compute capability 8.9 or newer, this one has 7.5" in triton_refusal(Request(GPU, quantise=True))
    monkeypatch.setattr(registry, "installed", lambda package: False)
    assert op.choose("auto", Request(GPU)).name == "torch"
    assert triton_refusal(Request(GPU)) == "needs the package triton, which is not installed"


def test_the_package_imports_without_triton_and_touches_no_gpu(pack):
    """Modules without "triton" in their name, in a Python where Triton cannot be imported."""
    names = [file.stem for file in sorted((pack / "kernels").glob("*.py")) if "triton" not in file.stem]
    program = (
        f"import sys; sys.path.insert(0, {str(pack)!r}); sys.modules['triton'] = None\n"
        "import torch, importlib\n"
        f"for name in {names!r}: importlib.import_module('kernels.' + name)\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr


def test_kernels_import_nothing_of_the_host_or_the_rest_of_the_pack(pack):
    for file in (pack / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{file.name}: imports from outside kernels/"
                modules = [] if node.level else [node.module]
            else:
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert module.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}, f"{file.name}: {module}"
