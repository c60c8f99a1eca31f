"""Under what a figure was measured, as every result file of this process's own torch and ComfyUI states it."""

import importlib.metadata
import platform
import time


def conditions() -> dict[str, str | None]:
    import torch
    from comfyui_version import __version__ as comfyui

    from ..launcher import machine

    cuda = torch.cuda.is_available()
    nvidia = machine.nvidia()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(0) if cuda else platform.processor() or platform.machine(),
        "driver": nvidia.driver if nvidia else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "comfyui": comfyui,
    }


def version(distribution: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
