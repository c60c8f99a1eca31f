"""The loader's device choice in the host's terms."""

import comfy.model_management as management
import torch

AUTO, CPU, MULTI_GPU = "auto", "cpu", "multi-gpu"


def options() -> list[str]:
    gpus = [str(device) for device in management.get_all_torch_devices() if device.type != CPU]
    return [AUTO, *gpus, CPU, MULTI_GPU]


def resolve(name: str) -> torch.device | None:
    """Where this process computes; None for 'auto' and 'multi-gpu': the host chooses.

    Raises ValueError for a device that is not there.
    """
    if name not in options():
        raise ValueError(
            f"device '{name}' is not on this machine, which has: {', '.join(options())}. "
            "Choose one of them; 'auto' always works."
        )
    return None if name in (AUTO, MULTI_GPU) else torch.device(name)


def ranks(num_gpus: int) -> tuple[str, ...]:
    """The devices of so many ranks: the first GPUs, 0 for all; without GPUs the processor, 0 for two ranks.

    Raises ValueError for more GPUs than there are.
    """
    available = torch.cuda.device_count()
    if not available:
        return (CPU,) * (num_gpus or 2)
    if num_gpus > available:
        raise ValueError(
            f"num_gpus is {num_gpus}, but there are {available}. Set it to 0 for all, or to at most {available}."
        )
    return tuple(f"cuda:{index}" for index in range(num_gpus or available))
