"""How much memory a server's processes hold over time: RAM by the system, GPU memory by NVML."""

import psutil
import pynvml

from .sampled import Sampled

MIB = 1024 * 1024


class MemoryLog(Sampled):
    """Samples the process `pid` and its children every 50 ms from entering to leaving.

    GPU memory is that of the processes, as NVML counts it. Where NVML does not see them (it knows processes by their
    numbers outside a container), it is what all GPUs hold more than before: `gpu_by` says which.
    """

    interval = 0.05

    def __init__(self, pid: int):
        super().__init__()
        self.process = psutil.Process(pid)
        self.samples: list[tuple[float, int, int, int]] = []  # seconds, RAM, GPU of the processes, GPU beyond before
        self._gpus: list = []
        self._before = 0

    def __enter__(self) -> "MemoryLog":
        self._gpus = _gpus()
        self._before = self._used()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self._gpus:
            pynvml.nvmlShutdown()

    @property
    def gpu_by(self) -> str | None:
        """'process', 'device' or, without a GPU, None."""
        if not self._gpus:
            return None
        return "process" if any(sample[2] for sample in self.samples) else "device"

    def series(self, until: float | None = None) -> list[tuple[float, int, int | None]]:
        """(seconds since entering, RAM in MiB, GPU memory in MiB or None) of every sample up to a time."""
        column = {"process": 2, "device": 3}.get(self.gpu_by)
        return [
            (round(sample[0], 3), round(sample[1] / MIB), None if column is None else round(sample[column] / MIB))
            for sample in list(self.samples)
            if until is None or sample[0] <= until
        ]

    def peaks(self, since: float) -> dict[str, int | None]:
        """The most RAM and GPU memory in MiB since a time."""
        # a prompt shorter than the interval may have no sample of its own: the last one before it counts
        series = self.series()
        recent = [sample for sample in series if sample[0] >= since] or series[-1:]
        gpu = None if self.gpu_by is None else max(sample[2] for sample in recent)
        return {"peak_ram_mib": max(sample[1] for sample in recent), "peak_gpu_mib": gpu}

    def sample(self) -> None:
        try:
            processes = [self.process, *self.process.children(recursive=True)]
            ram = sum(process.memory_info().rss for process in processes)
        except psutil.NoSuchProcess:  # the server, or a child between the two lines, has ended
            return
        held = _held_by({process.pid for process in processes}, self._gpus)
        self.samples.append((self.now(), ram, held, self._used() - self._before))

    def _used(self) -> int:
        return sum(pynvml.nvmlDeviceGetMemoryInfo(gpu).used for gpu in self._gpus)


def _gpus() -> list:
    """NVML's handles of the GPUs; empty without a driver."""
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return []
    return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]


def _held_by(pids: set[int], gpus: list) -> int:
    """Bytes that NVML ascribes to the processes; it has no number for a process in some set-ups."""
    running = [process for gpu in gpus for process in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)]
    return sum(process.usedGpuMemory or 0 for process in running if process.pid in pids)
