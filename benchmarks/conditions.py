"""Under what a figure was measured, as every result file of this process's own torch and ComfyUI states it."""

import importlib.metadata
import platform
import shutil
import subprocess
import time
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent


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
        **commit(),
    }


def gpu_conditions() -> dict[str, str | int | None]:
    """The same, printed too, for kernels by themselves: no ComfyUI need be there."""
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    about = {"gpu": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__}
    about |= {"triton": version("triton"), "cudnn": torch.backends.cudnn.version(), "date": time.strftime("%Y-%m-%d")}
    about |= commit()
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    return about


def commit() -> dict[str, str]:
    """The commit that was measured, ending in "-dirty" where files differ from it; nothing outside a git checkout.

    A copy without .git may lie in another project's checkout, whose commit would be wrong.
    """
    if not (PACK / ".git").exists() or not shutil.which("git"):
        return {}
    words = ["git", "-C", str(PACK), "describe", "--always", "--dirty"]
    described = subprocess.run(words, capture_output=True, text=True)
    return {"commit": described.stdout.strip()} if described.returncode == 0 else {}


def version(distribution: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
