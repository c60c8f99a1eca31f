"""Compiling side by side: what Triton is told, and what stays as it was."""

import contextlib
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from zimage_turbo.engine import encoder, rehearsal
from zimage_turbo.kernels import int4, norm

CUDA = torch.device("cuda:0")


class Kernel:
    """Stands for a JITFunction: what it was to be compiled for, and on which threads. It cannot be launched."""

    def __init__(self, error: Exception | None = None):
        self.asked, self.threads, self.error = [], [], error

    def preload(self, data: str) -> None:
        self.asked.append(data)
        self.threads.append(threading.current_thread().name)
        if self.error:
            raise self.error


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


@pytest.fixture
def hooks(monkeypatch):
    """Triton's settings, with a hook of somebody else's in place that has no objection to anything."""
    runtime = SimpleNamespace(jit_cache_hook=lambda **asked: None)
    monkeypatch.setattr(rehearsal, "knobs", lambda: SimpleNamespace(runtime=runtime))
    return runtime


def launch(hooks, kernel, data="8", module=norm.__name__, is_manual_warmup=False) -> bool:
    """Whether Triton would leave out this launch of a kernel that is not compiled yet."""
    fn = SimpleNamespace(module=module, name="kernel", jit_function=kernel)
    given = {"key": data, "repr": "kernel", "fn": fn, "compile": {"specialization_data": data}}
    return bool(hooks.jit_cache_hook(**given, is_manual_warmup=is_manual_warmup, already_compiled=False))


def test_kernels_are_compiled_on_threads_before_the_function_is_called_in_earnest(hooks):
    kernel, left_out = Kernel(), []

    def function(x):
        left_out.append([launch(hooks, kernel, data) for data in ("8", "16", "8")])
        return x + len(kernel.asked)

    before = hooks.jit_cache_hook
    result = rehearsal.rehearsed(function, CUDA)(torch.zeros(1))
    assert left_out == [[True, True, True], [False, False, False]]
    assert sorted(kernel.asked) == ["16", "8"] and all(name.startswith("compile") for name in kernel.threads)
    assert result.item() == 2 and hooks.jit_cache_hook is before


def test_what_may_follow_is_compiled_at_once(hooks):
    """Of the other calls nothing is left but their kernels."""
    kernel, calls = Kernel(), []

    def function(x):
        calls.append(len(x))
        launch(hooks, kernel, str(len(x)))
        return x + 1

    given, others = torch.zeros(3), [functools.partial(function, torch.zeros(length)) for length in (1, 2)]
    assert torch.equal(rehearsal.rehearsed(function, CUDA, others)(given), given + 1)
    assert calls == [3, 1, 2, 3] and sorted(kernel.asked) == ["1", "2", "3"]


def test_who_begins_does_not_wait(hooks, monkeypatch):
    compiling, goes_on = threading.Event(), threading.Event()
    kernel, before = Kernel(RuntimeError("no ptxas")), hooks.jit_cache_hook

    def preload(data):
        compiling.set()
        goes_on.wait(30)
        Kernel.preload(kernel, data)

    monkeypatch.setattr(kernel, "preload", preload, raising=False)
    begun = rehearsal.begun(lambda: launch(hooks, kernel), (), CUDA)
    assert compiling.wait(30) and not kernel.asked and hooks.jit_cache_hook is before
    goes_on.set()
    with pytest.raises(RuntimeError, match="no ptxas"):
        begun.wait()
    assert kernel.asked == ["8"]


def test_the_lengths_of_prompts_need_all_kinds_of_int4_products():
    few = [length for length in rehearsal.LENGTHS if length <= int4.FUSED_ROWS]
    assert int4.FUSED_ROWS in few and len(few) < len(rehearsal.LENGTHS)
    assert all(length % encoder.BUCKET == 0 for length in rehearsal.LENGTHS) and encoder.BUCKET in few


def test_launches_that_are_not_left_out(hooks):
    seen = {}

    def function():
        kernel = Kernel()
        seen["another pack's"] = launch(hooks, kernel, module="another_pack.kernels")
        seen["a compilation's own question"] = launch(hooks, kernel, is_manual_warmup=True)
        with ThreadPoolExecutor(1) as other:
            seen["another thread's"] = other.submit(launch, hooks, kernel).result()
        return torch.zeros(1)

    rehearsal.rehearsed(function, CUDA)()
    assert seen == dict.fromkeys(seen, False) and len(seen) == 3


def test_who_was_asked_before_is_asked_first(hooks):
    asked = []
    hooks.jit_cache_hook = lambda **given: asked.append(given["key"]) or True
    kernel = Kernel()
    rehearsal.rehearsed(lambda: launch(hooks, kernel), CUDA)()
    assert asked == ["8", "8"] and not kernel.asked


def test_errors_come_up_and_leave_nothing_behind(hooks):
    before = hooks.jit_cache_hook
    with pytest.raises(RuntimeError, match="no ptxas"):
        rehearsal.rehearsed(lambda: launch(hooks, Kernel(RuntimeError("no ptxas"))), CUDA)()

    def broken():
        raise ValueError("shape")

    with pytest.raises(ValueError, match="shape"):
        rehearsal.rehearsed(broken, CUDA)()
    assert hooks.jit_cache_hook is before


@pytest.mark.parametrize(("device", "triton"), [("cpu", "there"), ("cuda", None)], ids=["cpu", "an older Triton"])
def test_nothing_to_compile(monkeypatch, device, triton):
    """No Triton, or one before 3.4, is as none; then it is called once, in earnest."""
    calls = []
    monkeypatch.setattr(rehearsal, "knobs", lambda: triton)
    rehearsal.rehearsed(calls.append, torch.device(device))(1)
    assert calls == [1]
