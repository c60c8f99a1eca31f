"""The way of weights from a file to a GPU: while one is there, the next is read.

What the host reads is mapped: pages come when they are touched. A transfer from such memory touches and copies them by
a single thread, 2 GB a second on an H100's host. Here torch copies them, by all its threads, into pinned memory, from
where a transfer is as fast as the bus.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import comfy.model_management as management
import torch


def taken(
    weights: dict[str, torch.Tensor], names: Sequence[str], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each name with its weight on the device, taken out of `weights`, in this order."""
    if device.type != "cuda" or not names:
        for name in names:
            yield name, weights.pop(name).to(device)
        return
    buffer = torch.empty(max(weights[name].nbytes for name in names), dtype=torch.uint8)
    pinned = management.pin_memory(buffer)  # by the host, which counts it; without, transfers are slower

    def read(weight: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():  # which the buffer may come from; it holds for one thread
            return buffer[: weight.nbytes].view(weight.dtype).view(weight.shape).copy_(weight)

    try:
        with ThreadPoolExecutor(1, "reader") as reader:
            coming = reader.submit(read, weights.pop(names[0]))
            for name, after in itertools.zip_longest(names, names[1:]):
                there = coming.result().to(device)  # returns when the buffer is free
                if after is not None:
                    coming = reader.submit(read, weights.pop(after))
                yield name, there
    finally:
        if pinned:
            management.unpin_memory(buffer)
