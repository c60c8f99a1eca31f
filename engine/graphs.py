"""CUDA graphs of a function of tensors: captured once for every shape, replayed after, given up when they misfit.

A graph holds its intermediate results in one memory pool, which all graphs of a `Graphs` share because they never
run at the same time. Weights are read where they lay at capture: `state` must change whenever they may have moved.
"""

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from .recent import Recent

WARM_UP = 2  # calls before a capture: libraries allocate workspaces, kernels are compiled and chosen


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
    """At most `limit` graphs, the least recently used given up first."""

    def __init__(self, limit: int):
        self.captured, self.refused, self.pool, self.state = Recent(limit), set(), None, None

    def clear(self) -> None:
        """Free the graphs and their memory."""
        self.captured.clear()
        self.pool = None

    def run(
        self, function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], state: Hashable
    ) -> torch.Tensor | None:
        """function(*inputs), for inputs on one GPU; None, logged once, if these shapes could not be captured."""
        if state != self.state:
            self.clear()
            self.refused.clear()
            self.state = state
        key = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in inputs)
        if key in self.refused:
            return None
        try:
            captured = self.captured.get(key, lambda: self.capture(function, inputs))
        except (
            RuntimeError
        ) as error:  # out of memory is one of them; what is truly wrong comes up again without a graph
            reason = str(error).partition("\n")[0]
            logging.warning("Z-Image-Turbo: no CUDA graph for %s, it runs without: %s", list(inputs[0].shape), reason)
            self.refused.add(key)
            self.clear()
            torch.cuda.empty_cache()
            return None
        return captured.replay(inputs)

    def capture(self, function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Captured:
        held = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
        with torch.cuda.device(inputs[0].device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    function(*held)
            torch.cuda.current_stream().wait_stream(side)
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # other threads of the host may call CUDA meanwhile: only this thread's calls are held to the rules
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = function(*held)
        return Captured(graph, held, output)
