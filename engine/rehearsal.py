"""Compiling the kernels of a function side by side: Triton by itself compiles each where it is first launched.

A rehearsal calls the function without the launches of our kernels that are not compiled yet. Threads compile these
meanwhile (nine tenths of that is LLVM and ptxas, which run beside Python), and after it what launches them; then the
function is called in earnest. The results of the rehearsal are garbage that nobody sees; all else in the function must
depend on shapes and types alone, as it does in whatever a CUDA graph can capture.
"""

import contextvars
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import torch

from .compiling import KERNELS, knobs

MOST_THREADS = 16
ONE = threading.RLock()  # of rehearsals at a time: each puts its own hook into Triton, and the one before back
LENGTHS = (32, 64, 96)  # of padded prompts: each kind of product with INT4 weights, of up to 32, 64 and more rows


class Rehearsal:
    """What Triton asks before it compiles a kernel: True for "leave it, and leave out the launch".

    before: who was asked until now, whose word counts first.
    """

    def __init__(self, threads: Executor, device: torch.device, before: Callable[..., bool | None] | None = None):
        self.threads, self.device, self.before = threads, device, before
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

    def _compile(self, function: Any, data: str) -> Any | None:
        """The kernel; None if another hook left it out."""
        with torch.cuda.device(self.device):  # the current one belongs to a thread
            return function.preload(data)

    def finish(self) -> None:
        """Wait until all are compiled and have their launchers. Raises what compiling raised.

        Up to version 3.6 Triton has a launcher written in C and compiled where it is first asked for: half a second for
        each kernel. Only now, as a kernel that is there may be launched while the function is called.
        """
        alike = defaultdict(list)
        for kernel in filter(None, [each.result() for each in self.compiled.values()]):
            alike[_arguments(kernel)].append(kernel)
        list(self.threads.map(self._ready, alike.values()))

    def _ready(self, kernels: Sequence[Any]) -> None:
        """Have the launchers made of kernels that share one, one after the other.

        Side by side each would compile it and put its file in the place of one that is loaded already. The loader goes
        by a file's number, which some file systems then give to another launcher's file: it would be taken for this.
        """
        with torch.cuda.device(self.device):
            for kernel in kernels:
                kernel.run  # noqa: B018  makes the launcher


def _arguments(kernel: Any) -> tuple[str, ...]:
    """The kinds of a kernel's arguments, which is all that a launcher knows of it: a pointer is a pointer."""
    kinds = map(str, kernel.src.signature.values())
    return tuple("*" if kind.startswith("*") else kind for kind in kinds)


def rehearsed(
    function: Callable[..., torch.Tensor], device: torch.device, others: Sequence[Sequence[object]] = ()
) -> Callable[..., torch.Tensor]:
    """`function`, which compiles all that it needs before it does its work, for the first call on a device.

    others: inputs of such calls as may follow, which shall find their kernels. The call raises what compiling raised.
    """

    def run(*inputs: object) -> torch.Tensor:
        rehearse(lambda: [function(*each) for each in (inputs, *others)], (), device)
        return function(*inputs)

    return run


def rehearse(function: Callable[..., object], inputs: Sequence[torch.Tensor], device: torch.device) -> None:
    """Compile the kernels that function(*inputs) needs. Does not call it where nothing is to be compiled. Raises what
    compiling raised."""
    triton = knobs() if device.type == "cuda" else None
    if triton is None:
        return
    with ONE, ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "compile") as threads:
        before = triton.runtime.jit_cache_hook
        rehearsal = triton.runtime.jit_cache_hook = Rehearsal(threads, device, before)
        try:
            function(*inputs)
        finally:
            triton.runtime.jit_cache_hook = before
        rehearsal.finish()
