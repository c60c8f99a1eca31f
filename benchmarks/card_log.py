"""How busy GPUs are, and how much of their memory is in use, over time: by NVML, of the whole card."""

from collections.abc import Sequence

import pynvml

from .sampled import Sampled

MIB = 1 << 20


class CardLog(Sampled):
    """Samples the GPUs with these ids of the driver every 50 ms from entering to leaving; none of them is allowed."""

    interval = 0.05

    def __init__(self, uuids: Sequence[str]):
        super().__init__()
        self.uuids = uuids
        self.samples: list[list[tuple[int, int]]] = []  # of each GPU: per cent of the time that it was busy, bytes used

    def __enter__(self) -> "CardLog":
        if self.uuids:
            pynvml.nvmlInit()
        self._handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in self.uuids]
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self.uuids:
            pynvml.nvmlShutdown()

    def sample(self) -> None:
        self.samples.append(
            [
                (pynvml.nvmlDeviceGetUtilizationRates(handle).gpu, pynvml.nvmlDeviceGetMemoryInfo(handle).used)
                for handle in self._handles
            ]
        )

    def summary(self) -> dict[str, list[int]]:
        """Of each GPU the mean per cent that it was busy, and the most memory; nothing without GPUs or samples."""
        if not self.uuids or not self.samples:
            return {}
        by_card = [list(zip(*card, strict=True)) for card in zip(*self.samples, strict=True)]
        return {
            "busy_percent": [round(sum(busy) / len(busy)) for busy, _ in by_card],
            "memory_mib": [round(max(used) / MIB) for _, used in by_card],
        }
