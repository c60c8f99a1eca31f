"""What to do when GPU memory runs out: the memory of CUDA graphs comes first, since everything runs without them."""

import logging
from collections.abc import Callable

import comfy.model_management as management
import torch

from .graphs import Graphs


def with_room(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """function(*inputs), once more without any CUDA graph on their device if memory runs out.

    A graph's intermediate results stay reserved between replays, and nobody else can use them; the host, which counts
    all that torch has reserved and not handed out as free, cannot know. `function` must leave its inputs as they are.
    """
    try:
        return function(*inputs)
    except torch.cuda.OutOfMemoryError:
        if not give_up_graphs(inputs[0].device):
            raise
    return function(*inputs)


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
    return [module.graphs for module in modules if isinstance(getattr(module, "graphs", None), Graphs)]
