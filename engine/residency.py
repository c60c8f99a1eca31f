"""Which weights lie still on a GPU, as a CUDA graph needs them that reads them where they lay when it was captured."""

from collections.abc import Iterable

import comfy.model_management as management
import torch
from comfy.quant_ops import QuantizedTensor

from .checkpoint import StateDict

WORKING_MEMORY = 3 * 2**30  # of a 1024x1024 picture: the VAE 1.2 GiB, the denoiser 0.7, CUDA's context and code 0.8


def fits(weights: StateDict, dtype: torch.dtype, device: torch.device, beside: int = 0) -> bool:
    """Whether all weights, held in `dtype` where they are not quantised, can stay on the GPU.

    That is beside other models of so many bytes, what the host is to leave to others, and what a 1024x1024 picture
    takes. Such a model is given to the host's plain patcher: its dynamic one maps weights in when they are used.
    """
    if device.type != "cuda":
        return False
    sizes = (weight.numel() * (dtype.itemsize if held(weight) else weight.itemsize) for weight in weights.values())
    ours = torch.cuda.get_device_properties(device).total_memory - management.extra_reserved_memory()
    return sum(sizes) + beside + WORKING_MEMORY <= ours


def held(weight: torch.Tensor) -> bool:
    """Whether a weight takes on the type that a model is held in: a float that is not quantised."""
    return weight.is_floating_point() and weight.itemsize > 1


def near(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A small weight where x lies: gains of norms are the first that the host offloads, and come along each time."""
    return weight.to(x.device)


def resident_weights(modules: Iterable[torch.nn.Module], device: torch.device) -> tuple[tuple[int, ...], ...] | None:
    """Where every weight of these modules, and of what is in them, lies, if a CUDA graph may rely on it; else None.

    It may if all lie on this GPU and are used as they are, and if memory comes from torch's own allocator.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    if torch.cuda.get_allocator_backend() != "native":  # graphs share a pool, which cudaMallocAsync has none of
        return None
    weights = unchanged_weights(modules)
    return None if weights is None or any(w.device != device for w in weights) else tuple(map(addresses, weights))


def unchanged_weights(modules: Iterable[torch.nn.Module]) -> list[torch.Tensor] | None:
    """Every weight of these modules, and of what is in them, if all are used as they are; else None.

    It is asked before every evaluation: reading the layers' own dictionaries takes a fifth of the time that asking
    for their attributes does.
    """
    weights, layers = [], list(modules)
    while layers:
        layer = layers.pop()
        state = layer.__dict__
        patched = state.get("weight_function") or state.get("bias_function")
        if patched or "_v" in state or ("forward" in state and replaced(layer)):  # hooks, dynamic VRAM, bypass LoRA
            return None
        weights += [weight for weight in state["_parameters"].values() if weight is not None]
        layers += [child for child in state["_modules"].values() if child is not None]
    return weights


def addresses(weight: torch.Tensor) -> tuple[int, ...]:
    """Where a weight lies; a quantised one lies in several places."""
    quantised = isinstance(weight, QuantizedTensor)
    parts = weight.layout_cls.get_plain_tensors(weight) if quantised else (weight,)
    return tuple(part.data_ptr() for part in parts)


def replaced(layer: torch.nn.Module) -> bool:
    """Whether a layer's forward is not its class's: a bypass LoRA puts its own there, and the bound method back."""
    return getattr(layer.forward, "__func__", None) is not type(layer).forward
