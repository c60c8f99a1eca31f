"""Which of our kernels run here, and which Triton makes ready, for the GPU tests."""

import sys
import threading

import pytest
import torch

from zimage_turbo.engine import compiling, model


def skip_unless_it_runs(attention: str) -> None:
    """Skips a test, with the reason, where that backend cannot run on the GPU."""
    try:
        model.check_attention(attention, torch.device("cuda:0"), torch.bfloat16)
    except ValueError as reason:
        pytest.skip(str(reason))


def forgotten(monkeypatch) -> list[tuple[str, bool]]:
    """Have this process forget all kernels: what it compiles or reads from disk from then on, by module and whether a
    rehearsal did so on its threads."""
    triton, knobs = pytest.importorskip("triton"), compiling.knobs()
    made = []

    def listener(*, src, cache_hit, **rest):
        if src.fn.__module__.startswith(compiling.KERNELS):
            made.append((src.fn.__module__, threading.current_thread().name.startswith("compile")))

    monkeypatch.setattr(knobs.compilation, "listener", listener)
    for name, module in list(sys.modules.items()):
        if name.startswith(compiling.KERNELS):
            for kernel in vars(module).values():
                if isinstance(kernel, triton.runtime.JITFunction):
                    kernel.device_caches.clear()
    return made
