"""What to do when GPU memory runs out: the memory of CUDA graphs comes first, since everything runs without them."""

import logging
from collections.abc import Callable

import comfy.model_management as management
import torch

from .graphs import Graphs

SPARE = 2 * 2**30  # the VAE of a 1024x1024 picture 1.2 GiB, the denoiser's graph 0.7


def with_room(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor, frugal: Callable[..., torch.Tensor] | None = None
) -> torch.Tensor:
    """function(*inputs); if memory runs out, once more without any CUDA graph on their device, by `frugal` if given.

    A graph's intermediate results stay reserved between replays, and nobody else can use them; the host, which counts
    all that torch has reserved and not handed out as free, cannot know. `function` must leave its inputs as they are.
    """
    try:
        return function(*inputs)
    except torch.cuda.OutOfMemoryError:
        if not give_up_graphs(inputs[0].device) and frugal is None:
            raise
    return (frugal or function)(*inputs)


def by_halves(function: Callable[..., torch.Tensor], *batches: torch.Tensor) -> torch.Tensor:
    """function(*batches), of tensors [B, …]; if memory runs out, of half of the rows at a time, and so down to one.

    `function` treats every row for itself and leaves its inputs as they are.
    """
    rows = len(batches[0])
    try:
        return function(*batches)
    except torch.cuda.OutOfMemoryError:
        if rows == 1:
            raise
    logging.warning("Z-Image-Turbo: GPU memory ran out; a batch of %d is computed in two parts.", rows)
    torch.cuda.empty_cache()
    halves = zip(*(batch.tensor_split(2) for batch in batches), strict=True)
    return torch.cat([by_halves(function, *half) for half in halves])


def spares_a_graph(device: torch.device) -> bool:
    """Whether a GPU has memory beside what a CUDA graph reserves, which is then missing to everyone else."""
    return management.get_free_memory(device) - management.extra_reserved_memory() >= SPARE


def give_up_graphs(device: torch.device) -> bool:
    """Free the CUDA graphs of all models that are loaded there, which capture no more; False if there were none."""
    found = [graphs for graphs in loaded_graphs() if graphs.device == device]
    for graphs in found:
        graphs.give_up()
    if found:
        logging.warning("Z-Image-Turbo: GPU memory ran out; models that are loaded now run without CUDA graphs.")
        torch.cuda.empty_cache()
    return bool(found)


def loaded_graphs() -> list[Graphs]:
    """Those of all models that the host has loaded."""
    roots = [loaded.model.model for loaded in management.current_loaded_models if loaded.model is not None]
    modules = (module for root in roots for module in root.modules())
    ours = [module for module in modules if isinstance(getattr(module, "graphs", None), Graphs)]
    return [each.graphs for module in ours for each in (module, *getattr(module, "joints", {}).values())]
