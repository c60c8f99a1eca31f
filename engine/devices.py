"""The loader's device choice in the host's terms."""

import comfy.model_management as management
import torch

AUTO, CPU = "auto", "cpu"


def options() -> list[str]:
    return [AUTO, *(str(device) for device in management.get_all_torch_devices() if device.type != CPU), CPU]


def resolve(name: str) -> torch.device | None:
    """None for 'auto': the host chooses. Raises ValueError for a device that is not there."""
    if name not in options():
        raise ValueError(
            f"device '{name}' is not on this machine, which has: {', '.join(options())}. "
            "Choose one of them; 'auto' always works."
        )
    return None if name == AUTO else torch.device(name)
