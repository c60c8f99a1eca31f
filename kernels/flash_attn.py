"""The package flash-attn, versions 2 to 4, as a backend of `attention`: imported when called, not when looked for."""

import functools
import importlib
import importlib.util
from pathlib import Path

import torch

from .registry import installed


def flash_attn(q, k, v, lengths):
    """softmax(q kᵀ / sqrt(D)) v for q, k, v [B, H, S, D] by the version that `flash_attn_module` names."""
    module = importlib.import_module(flash_attn_module(torch.cuda.get_device_capability(q.device)))
    out = module.flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    # version 4 and early builds of 3 return the sums of the softmax too
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


@functools.cache
def flash_attn_module(capability: tuple[int, int]) -> str | None:
    """The flash-attn installed for such a GPU, or None: 3 on Hopper, 4 there and on Blackwell, else 2."""
    if capability[0] == 9 and installed("flash_attn_interface"):
        return "flash_attn_interface"
    # find_spec("flash_attn.cute") would import version 2 for its parent, so look at the files
    spec = importlib.util.find_spec("flash_attn")
    folders = [Path(folder) for folder in spec.submodule_search_locations] if spec else []
    if capability[0] in (9, 10) and any((folder / "cute").is_dir() for folder in folders):
        return "flash_attn.cute"
    if capability >= (8, 0) and any((folder / "flash_attn_interface.py").is_file() for folder in folders):
        return "flash_attn"
    return None
