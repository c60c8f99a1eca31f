"""Compiling the kernels of a function side by side: Triton by itself compiles each where it is first launched.

A rehearsal calls the function without the launches of our kernels that are not compiled yet. Threads compile these
meanwhile (nine tenths of that is LLVM and ptxas, which run beside Python), and then the function is called in earnest.
The results of the rehearsal are garbage that nobody sees; all else in the function must depend on shapes and types
alone, as it does in whatever a CUDA graph can capture.

Threads only compile. Kernels are launched, in a rehearsal too, by the one thread that draws: Triton up to version 3.6
loads what launches a kernel as a Python module, under one name for all kernels, and two threads that do so at once can
take each other's.
"""

import contextvars
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from . import launch_code
from .compiling import KERNELS, knobs

MOST_THREADS = 16
LENGTHS = (32, 64, 96)  # of padded prompts: each kind of product with INT4 weights, of up to 32, 64 and more rows


class Rehearsal:
    """What Triton asks before it compiles a kernel: True for "leave it, and leave out the launch".

    before: who was asked until now, whose word counts first.
    """

    def __init__(self, device: torch.device, before: Callable[..., bool | None] | None = None):
        self.threads = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "compile")
        self.device, self.before = device, before
        self.owner = threading.get_ident()
        self.compiled: dict[str, Future] = {}

    def __call__(self, *, fn: Any, compile: dict[str, Any], is_manual_warmup: bool, **rest: Any) -> bool:
        """fn: the kernel's module, name and jit_function; compile: what it is to be compiled for."""
        if self.before is not None and self.before(fn=fn, compile=compile, is_manual_warmup=is_manual_warmup, **rest):
            return True
        # Launches of other threads are in earnest; a warm-up is our own compilation, asking on its thread.
        if is_manual_warmup or threading.get_ident() != self.owner or not fn.module.startswith(KERNELS):
            return False
        data = compile["specialization_data"]
        if data not in self.compiled:  # asks for each launch, since a kernel left out is not there the next time
            context = contextvars.copy_context()  # says which node runs
            self.compiled[data] = self.threads.submit(context.run, self._compile, fn.jit_function, data)
        return True

    def _compile(self, function: Any, data: str) -> None:
        with torch.cuda.device(self.device):  # the current one belongs to a thread
            if kernel := function.preload(data):  # None where a hook of somebody else's objects
                launch_code.compile_ahead(kernel)

    def wait(self) -> None:
        """Until all are compiled. Raises what compiling raised."""
        for each in self.compiled.values():
            each.result()


def rehearsed(
    function: Callable[..., torch.Tensor], device: torch.device, others: Sequence[Callable[[], object]] = ()
) -> Callable[..., torch.Tensor]:
    """`function`, which compiles all that it needs before it does its work, for the first call on a device.

    others: calls like those that may follow, which shall find their kernels. The call raises what compiling raised.
    """

    def run(*inputs: object) -> torch.Tensor:
        rehearse(lambda: [function(*inputs), *(call() for call in others)], (), device)
        return function(*inputs)

    return run


def rehearse(function: Callable[..., object], inputs: Sequence[torch.Tensor], device: torch.device) -> None:
    """Compile the kernels that function(*inputs) needs. Does not call it where nothing is to be compiled. Raises what
    compiling raised."""
    if rehearsal := begun(function, inputs, device):
        rehearsal.wait()


def begun(function: Callable[..., object], inputs: Sequence[torch.Tensor], device: torch.device) -> Rehearsal | None:
    """As `rehearse`, but without waiting until all are compiled; None where nothing is to be."""
    triton = knobs() if device.type == "cuda" else None
    if triton is None:
        return None
    before = triton.runtime.jit_cache_hook
    rehearsal = triton.runtime.jit_cache_hook = Rehearsal(device, before)
    try:
        function(*inputs)
    finally:
        triton.runtime.jit_cache_hook = before
        rehearsal.threads.shutdown(wait=False)
    return rehearsal
