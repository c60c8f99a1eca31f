"""INT4 weights expanded to FP8 beside the attention that comes before their products.

Attention keeps tensor cores busy and memory idle, an expansion does the reverse. Its few programs start first, on a
stream of their own, and stay on every multiprocessor until they are done; FP8 attention fits into what they leave.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator

import torch

from ..kernels import int4
from . import layouts

PROGRAMS = 2  # on a multiprocessor: with three of FP8 attention's they fill its registers
WORK_OF_A_WEIGHT = 800  # floating-point operations of attention that take as long as expanding a weight beside them
Expanded = dict[torch.nn.Module, torch.Tensor]


@contextlib.contextmanager
def beside(linears: Iterable[torch.nn.Module], work: int) -> Iterator[Expanded]:
    """The expanded weights of those linears that hold INT4, all of which compute in FP8 on one GPU.

    They are being written during the with block, and may be read after it. work: floating-point operations of the
    attention in the block; the first linears get their weights expanded, as many as that takes time for.
    """
    weights = {}
    for linear in linears:
        if layouts.is_int4(linear.weight) and work >= WORK_OF_A_WEIGHT * linear.weight.numel():
            weights[linear] = linear.weight
            work -= WORK_OF_A_WEIGHT * linear.weight.numel()
    if not weights:
        yield {}
        return
    device = next(iter(weights.values()))._qdata.device
    here, there = torch.cuda.current_stream(device), _stream(device)
    expanded = {
        linear: torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=device)
        for linear, weight in weights.items()
    }
    programs = PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    there.wait_stream(here)
    try:
        with torch.cuda.stream(there):
            for linear, weight in weights.items():
                packed = layouts.packed(weight._qdata, weight._params)
                int4.expand(packed, torch.float8_e4m3fn, expanded[linear], programs=programs)
        yield expanded
    finally:
        here.wait_stream(there)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Of high priority: what is captured or runs as usual is on another."""
    return torch.cuda.Stream(device, priority=-1)
