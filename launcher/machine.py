"""Facts about the machine: NVIDIA GPUs and driver, memory, disk. Bytes everywhere."""

import ctypes
import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

GIB = 1024**3
MIB = 1024**2


@dataclasses.dataclass(frozen=True)
class Gpu:
    name: str
    total: int
    free: int


@dataclasses.dataclass(frozen=True)
class Nvidia:
    """The driver's version and its GPUs, in the driver's order (CUDA_VISIBLE_DEVICES is not applied)."""

    driver: str
    gpus: tuple[Gpu, ...]


def nvidia() -> Nvidia | None:
    """Ask the NVIDIA driver, through nvidia-ml-py if it can be imported, else nvidia-smi. None without a driver."""
    try:
        import pynvml
    except ImportError:
        return _from_nvidia_smi()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            gpus.append(Gpu(pynvml.nvmlDeviceGetName(handle), memory.total, memory.free))
        return Nvidia(pynvml.nvmlSystemGetDriverVersion(), tuple(gpus))
    finally:
        pynvml.nvmlShutdown()


def _from_nvidia_smi() -> Nvidia | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version,memory.total,memory.free,name", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    # nvidia-smi stands on some machines without a GPU and then exits with an error: there is no driver to use.
    return parse_nvidia_smi(answer.stdout) if answer.returncode == 0 else None


def parse_nvidia_smi(text: str) -> Nvidia | None:
    """Read nvidia-smi's CSV lines ``driver, total MiB, free MiB, name``; None when there is no line.

    A memory column of ``[N/A]``, as integrated GPUs report it, counts as 0.
    """
    rows = [[cell.strip() for cell in line.split(",", 3)] for line in text.splitlines() if line.count(",") >= 3]
    if not rows:
        return None

    def size(cell: str) -> int:
        return int(cell) * MIB if cell.isdigit() else 0

    return Nvidia(rows[0][0], tuple(Gpu(name, size(total), size(free)) for _, total, free, name in rows))


def memory() -> tuple[int, int] | None:
    """Return (total, available) memory, or None where the operating system offers no way without more packages."""
    if os.name == "nt":
        return _windows_memory()
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        return parse_meminfo(meminfo.read_text(encoding="ascii"))
    return None


def parse_meminfo(text: str) -> tuple[int, int]:
    """Return (MemTotal, MemAvailable) of /proc/meminfo."""
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if ":" in line}
    return fields["MemTotal"], fields["MemAvailable"]


def _windows_memory() -> tuple[int, int]:
    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
            (name, ctypes.c_uint64)
            for name in ("total", "available", "page_total", "page_free", "virtual", "virtual_free", "extended")
        ]

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status.total, status.available


def free_disk(folder: Path) -> int:
    """Return the free space where ``folder`` is, or would be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
