"""Under what a figure was measured, as every result file of this process's own torch and ComfyUI states it."""

import platform
import time


def conditions() -> dict[str, str]:
    import torch
    from comfyui_version import __version__ as comfyui

    cuda = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(0) if cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "comfyui": comfyui,
    }
