"""Why a forward of ours leaves a request to the host's, as far as that is the same for every model."""

from collections.abc import Iterable

import comfy.model_management as management
import torch

from ..kernels import registry
from .residency import replaced


def common_refusal(device: torch.device) -> str | None:
    """Why none of our forwards can run on `device` at this moment; None if they can."""
    if management.in_training or torch.is_grad_enabled():
        return "gradients are wanted"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    return triton_refusal(device)


def triton_refusal(device: torch.device) -> str | None:
    """Why our kernels cannot run on a GPU; None if they can, and on a processor, which takes their references."""
    return registry.triton_refusal(registry.Request(device)) if device.type == "cuda" else None


def bypass_refusal(parts: Iterable[torch.nn.Module]) -> str | None:
    """Why parts cannot be computed without calling them, as fused kernels do; None if they can."""
    for part in parts:
        if replaced(part) or part._forward_hooks or part._forward_pre_hooks:
            return f"the forward of a {type(part).__name__} is replaced or hooked"
    return None
