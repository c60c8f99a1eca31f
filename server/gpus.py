"""GPU memory as the driver sees it, by NVML."""

import pynvml

_MIB = 1024 * 1024


def gpu_memory() -> list[dict]:
    """Name, used and total MiB of every NVIDIA GPU; an empty list on a machine without its driver."""
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return []
    try:
        return [_one(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _one(handle) -> dict:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {
        "name": pynvml.nvmlDeviceGetName(handle),
        "used_mib": round(memory.used / _MIB),
        "total_mib": round(memory.total / _MIB),
    }
