"""GPUs as the driver sees them, by NVML."""

import pynvml

_MIB = 1024 * 1024


def gpu_state() -> list[dict]:
    """Every NVIDIA GPU: name, id, used and total MiB, utilisation in percent, temperature in °C, and links that are up.

    What a driver does not say is left out; if it says nothing at all, one entry has the reason. Empty without a driver.
    """
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
    state = {"name": pynvml.nvmlDeviceGetName(handle)}
    for reader in (_uuid, _memory, _utilisation, _temperature, _nvlinks):
        try:
            state |= reader(handle)
        except pynvml.NVMLError as error:
            if reader is _memory:  # GPUs that share the processor's memory, slices of a GPU
                state["error"] = str(error)
    return state


def _uuid(handle) -> dict:
    return {"uuid": pynvml.nvmlDeviceGetUUID(handle)}


def _memory(handle) -> dict:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {"used_mib": round(memory.used / _MIB), "total_mib": round(memory.total / _MIB)}


def _utilisation(handle) -> dict:
    return {"utilisation_percent": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu}


def _temperature(handle) -> dict:
    return {"temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)}


def _nvlinks(handle) -> dict:
    """How many NVLinks are up; those beyond the last that a GPU has are an error of their own."""
    up = 0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            up += pynvml.nvmlDeviceGetNvLinkState(handle, link)
        except pynvml.NVMLError:
            break
    return {"nvlinks": up} if up else {}
