"""GPU memory as the driver sees it, by NVML."""

import pynvml

_MIB = 1024 * 1024


def gpu_memory() -> list[dict]:
    """Name, used and total MiB of every NVIDIA GPU, or why the driver does not say; empty without a driver."""
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return []
    except pynvml.NVMLError as error:  # for one, a driver that was updated and not yet loaded
        return [{"error": str(error)}]
    try:
        return [_one(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return [{"error": str(error)}]
    finally:
        pynvml.nvmlShutdown()


def _one(handle) -> dict:
    name = pynvml.nvmlDeviceGetName(handle)
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError as error:  # GPUs that share the processor's memory, slices of a GPU
        return {"name": name, "error": str(error)}
    return {"name": name, "used_mib": round(memory.used / _MIB), "total_mib": round(memory.total / _MIB)}
