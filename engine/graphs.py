"""CUDA graphs of a function of tensors: captured once for every shape, replayed after, given up when they misfit.

A graph holds its intermediate results in one memory pool, which all graphs of a `Graphs` share because they never
run at the same time. Weights are read where they lay at capture: `state` must change whenever they may have moved.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from .recent import Recent

MAX_SEEN = 1000  # shapes that are counted; after so many, counting begins anew
WARM_UP = 1  # evaluations of a shape before its capture: libraries allocate workspaces, kernels are compiled
EAGER, CAPTURE, REPLAY = range(3)
CAPTURING = threading.Lock()  # torch captures one graph at a time in a process


@dataclass
class Captured:
    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    output: torch.Tensor

    def replay(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        return self.output.clone()


class Graphs:
    """At most `limit` graphs, the least recently used given up first; none any more once they are `given_up`.

    spares_one: whether a device has memory to spare for one; asked before each capture. least: the least number that
    any of the ranks gives that compute together (`Together.least`). What they exchange is captured too, and NCCL wants
    it captured on all of them or on none: one may have lost its graphs, as its weights moved, while others have theirs.
    """

    def __init__(self, limit: int, spares_one: Callable[[torch.device], bool], least: Callable[[int], int] = int):
        self.spares_one, self.least = spares_one, least
        self.captured, self.seen, self.refused = Recent(limit), Counter(), set()
        self.pool, self.stream, self.state = None, None, None
        self.given_up = False

    def clear(self) -> None:
        """Free the graphs and their memory."""
        self.captured.clear()
        self.seen.clear()
        self.pool = None

    def give_up(self) -> None:
        """Free the graphs for others and capture no more: what was short once would be again at the next picture."""
        self.clear()
        self.given_up = True

    @property
    def device(self) -> torch.device | None:
        """Where graphs hold memory; None if they hold none."""
        return None if self.pool is None else self.stream.device

    def run(
        self, function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], state: Hashable
    ) -> torch.Tensor | None:
        """function(*inputs) by a graph, for inputs on one GPU; None if the caller is to call it.

        The first calls with these shapes are the caller's, so that rare shapes cost no capture, and so are all while
        memory is short. A capture that fails, because something in it cannot be captured, is logged and not repeated.
        state: None where weights are not still.
        """
        if state != self.state:
            self.clear()
            self.refused.clear()
            self.state = state
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
        if len(self.seen) >= MAX_SEEN:
            self.seen.clear()
        self.seen[key] += 1
        step = self.least(self._step(key, inputs[0].device))
        if step == EAGER:
            return None
        if step == CAPTURE:
            self.captured.drop(key)  # which another rank has not
        try:
            captured = self.captured.get(key, lambda: self.capture_agreed(function, inputs))
        except RuntimeError as error:  # what is wrong without a graph too comes up again in the caller's own call
            reason = str(error).partition("\n")[0]
            logging.warning("Z-Image-Turbo: no CUDA graph for %s, it runs without: %s", list(inputs[0].shape), reason)
            self.clear()
            self.refused.add(key)
            torch.cuda.empty_cache()
            return None
        return captured.replay(inputs)

    def _step(self, key: Hashable, device: torch.device) -> int:
        """What this process could do for a request."""
        if self.given_up or self.state is None or key in self.refused or self.seen[key] <= WARM_UP:
            return EAGER
        if key in self.captured:
            return REPLAY
        return CAPTURE if self.spares_one(device) else EAGER

    def capture_agreed(self, function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Captured:
        """`capture`; raises RuntimeError where it fails, and where it fails on another rank."""
        try:
            captured = self.capture(function, inputs)
        except RuntimeError:
            self.least(False)
            raise
        if not self.least(True):
            raise RuntimeError("another rank could not capture one")
        return captured

    def capture(self, function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Captured:
        with CAPTURING, torch.cuda.device(inputs[0].device):
            with torch.inference_mode(False):  # so that a replay may write into them in any mode
                held = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in inputs]
            for place, tensor in zip(held, inputs, strict=True):
                place.copy_(tensor)
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # A stream of our own: torch's default one belongs to the first device that captured. The same for all our
            # graphs: cuBLAS keeps a workspace, 32 MB on Hopper, for every stream that it was ever called on.
            if self.stream is None or self.stream.device != inputs[0].device:
                self.stream = torch.cuda.Stream()
            # thread_local: other threads of the host may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                output = function(*held)
        return Captured(graph, held, output)
