"""What torch's allocator holds on the GPU over time, and at most in every phase of a run."""

import contextlib
from collections.abc import Iterator

from .sampled import Sampled

MIB = 2**20


class AllocatorLog(Sampled):
    """Samples allocated and reserved bytes every 10 ms from entering to leaving; a phase's peaks are the allocator's.

    The peak of reserved memory is what a card must have beside the driver's own context.
    """

    interval = 0.01

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[tuple[float, int, int]] = []  # seconds, allocated, reserved
        self.phases: list[dict] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[dict]:
        """A row of `phases`, to which the caller may add: begin and end in s, peaks in MiB."""
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        row = {"phase": name, "begin_s": round(self.now(), 3)}
        self.phases.append(row)
        try:
            yield row
            torch.cuda.synchronize()
        finally:
            row |= {
                "end_s": round(self.now(), 3),
                "peak_allocated_mib": mib(torch.cuda.max_memory_allocated()),
                "peak_reserved_mib": mib(torch.cuda.max_memory_reserved()),
            }

    def series(self) -> list[tuple[float, int, int]]:
        """Seconds, allocated MiB, reserved MiB; samples that repeat both their neighbours are left out."""
        rounded = [(round(at, 3), round(held / MIB), round(kept / MIB)) for at, held, kept in self.samples]
        inner = (
            here
            for before, here, after in zip(rounded, rounded[1:], rounded[2:], strict=False)
            if not before[1:] == here[1:] == after[1:]
        )
        return [*rounded[:1], *inner, *rounded[-1:]]

    def sample(self) -> None:
        import torch

        self.samples.append((self.now(), torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))


def mib(count: int) -> float:
    return round(count / MIB, 1)
