"""The way of weights through a GPU: while one is worked on there, the next is read.

What the host reads is mapped: pages come when they are touched. A transfer from such memory touches and copies them
by a single thread, 2 GB a second on an H100's host, and one back into new memory is slower still. Here torch copies,
by all its threads, into pinned memory and out of it, between which and the GPU a transfer is as fast as the bus.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import comfy.model_management as management
import torch


def passed(
    weights: dict[str, torch.Tensor],
    names: Sequence[str],
    device: torch.device,
    make: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
) -> Iterator[dict[str, torch.Tensor]]:
    """What make(name, weight on the device) makes of each, on the CPU; the weights are taken out of `weights`.

    Nothing that is made may be larger than the largest of them.
    """
    if device.type != "cuda" or not names:
        for name in names:
            yield {key: part.cpu() for key, part in make(name, weights.pop(name).to(device)).items()}
        return
    most = max(weights[name].nbytes for name in names)

    def read(weight: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():  # which the buffer may come from; it holds for one thread
            return _as(weight, there).copy_(weight)

    def returned(part: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(part, device="cpu").copy_(_as(part, back).copy_(part)) if part.is_cuda else part

    with _pinned(most) as there, _pinned(most) as back, ThreadPoolExecutor(1, "reader") as reader:
        coming = reader.submit(read, weights.pop(names[0]))
        for name, after in itertools.zip_longest(names, names[1:]):
            weight = coming.result().to(device)  # returns when the buffer is free
            if after is not None:
                coming = reader.submit(read, weights.pop(after))
            yield {key: returned(part) for key, part in make(name, weight).items()}


@contextlib.contextmanager
def _pinned(size: int) -> Iterator[torch.Tensor]:
    """So many bytes, pinned by the host, which counts them; without, transfers are slower."""
    buffer = torch.empty(size, dtype=torch.uint8)
    pinned = management.pin_memory(buffer)
    try:
        yield buffer
    finally:
        if pinned:
            management.unpin_memory(buffer)


def _as(tensor: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The beginning of a buffer in the shape and type of a tensor."""
    return buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
