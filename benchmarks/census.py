"""What a process holds: memory, open files and threads. Ranks of a group tell it as one of their operations."""

import ctypes
import gc
import os

import psutil
import torch

from .allocator_log import mib


def taken(device: torch.device) -> dict[str, float]:
    """Of this process; memory in MiB, on a GPU also torch's there. `kept_mib`: what is left of main memory once Python
    has collected its garbage, which it does seldom, and glibc has given back what nothing lies in."""
    process = psutil.Process()
    held = {"pid": os.getpid(), "rss_mib": mib(process.memory_info().rss)}
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    held["kept_mib"] = mib(process.memory_info().rss)
    if device.type == "cuda":
        held |= {"allocated_mib": mib(torch.cuda.memory_allocated()), "reserved_mib": mib(torch.cuda.memory_reserved())}
    return held | {"files": process.num_fds(), "threads": process.num_threads()}


def census(rank, job) -> dict[str, float]:
    return taken(rank.device)


OPERATIONS = {"census": census}
