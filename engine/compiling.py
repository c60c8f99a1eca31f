"""Tells that Triton compiles our kernels: where none is on disk yet, that takes most of the first picture's time."""

import functools
import importlib
import importlib.util
import logging
import threading
from collections.abc import Callable
from typing import Any

import torch

from ..kernels.registry import installed
from . import progress

KERNELS = f"{__package__.rpartition('.')[0]}.kernels."


class Listener:
    """What Triton calls after each kernel that it compiled or found on disk. Counts the former, of ours, in a run.

    before: the listener in whose place this one is put; it goes on hearing of everything.
    """

    def __init__(self, before: Callable[..., None] | None = None):
        self.before, self.run, self.count = before, None, 0
        self.lock = threading.Lock()  # several threads compile (rehearsal.py)

    def __call__(self, *, src: Any, cache_hit: bool, **rest: Any) -> None:
        """src: Triton's source, whose `fn` is the kernel, unless it is a file."""
        if self.before is not None:
            self.before(src=src, cache_hit=cache_hit, **rest)
        if not cache_hit and getattr(getattr(src, "fn", None), "__module__", "").startswith(KERNELS):
            self._count()

    def _count(self) -> None:
        run = progress.run()
        with self.lock:
            if run != self.run:
                self.run, self.count = run, 0
            self.count += 1
            if self.count == 1:
                logging.info(
                    "Z-Image-Turbo: compiling GPU kernels; this happens once on a machine, and anew after updates."
                )
            progress.show(f"GPU kernels compiled: {self.count} (once on a machine)")


def announce(device: torch.device) -> None:
    """Have compilations told of from now on, if the device is one that kernels are compiled for."""
    if device.type == "cuda" and knobs() is not None:
        _listen()


def knobs() -> Any | None:
    """Triton's settings, where its listeners and hooks are put; None without Triton and before its version 3.4."""
    if not installed("triton") or importlib.util.find_spec("triton.knobs") is None:
        return None
    return importlib.import_module("triton.knobs")


@functools.cache
def _listen() -> None:
    """Once a process: others may have put their listener before ours since."""
    compilation = knobs().compilation
    compilation.listener = Listener(compilation.listener)
