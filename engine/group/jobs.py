"""The work of a rank: one job after another on a thread of its own, so that the rank still answers meanwhile."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from . import wire
from .faults import CUDA, EXCEPTION, EXCHANGE, MEMORY

# What gloo's errors have in common, which torch raises as plain ones; NCCL's are DistErrors.
_OF_GLOO = ("gloo/", "pair closure")
CANCELLED, REFUSED = "cancelled", "refused"  # ends of a job after which the rank is well; others are kinds of faults
_END = None


class Cancelled(Exception):
    """Raised within a job that is to stop."""


class Job:
    """A request that a rank does, and its answer in the making: frames that the event loop sends while it goes on."""

    def __init__(self, name: str, operation: str, request: wire.Tree, loop: asyncio.AbstractEventLoop):
        self.name, self.operation, self.request, self.loop = name, operation, request, loop
        self.since: float | None = None
        self.frames: asyncio.Queue[tuple[bytes, bytes] | None] = asyncio.Queue()
        self._stop = threading.Event()

    def cancel(self) -> None:
        """Have it stop at its next `check`."""
        self._stop.set()

    @property
    def cancelled(self) -> bool:
        return self._stop.is_set()

    def check(self) -> None:
        """To be called where work may stop, as between steps. Raises Cancelled."""
        if self.cancelled:
            raise Cancelled

    def tell(self, progress: wire.Tree) -> None:
        """Send something to whoever asked, before the work is done."""
        self._put((wire.PROGRESS, wire.pack(progress)))

    def _put(self, frame: tuple[bytes, bytes] | None) -> None:
        self.loop.call_soon_threadsafe(self.frames.put_nowait, frame)

    def run(self, work: Callable[["Job"], wire.Tree]) -> None:
        """On the rank's thread: the last frame is the result of work(self), or what went wrong."""
        self.since = time.time()
        try:
            with torch.inference_mode():
                result = wire.RESULT, wire.pack(work(self))
        except BaseException as error:  # the host interrupts by one; whoever asked would wait to its limit
            kind = _kind(error)
            if kind not in (CANCELLED, REFUSED):
                logging.exception("'%s' failed.", self.operation)
            result = wire.ERROR, wire.pack({"kind": kind, "what": _told(kind, error)})
        self._put(result)
        self._put(_END)


class Worker:
    """The thread. begin: called on it first, as CUDA's current device is a thread's own."""

    def __init__(self, begin: Callable[[], object]):
        self.thread = ThreadPoolExecutor(1, "rank", initializer=begin)
        self.jobs: dict[str, Job] = {}

    def add(self, job: Job, work: Callable[[Job], wire.Tree]) -> None:
        self.jobs[job.name] = job
        self.thread.submit(job.run, work)

    def busy(self) -> dict | None:
        """What it does, and since when in seconds since 1970; None if nothing."""
        running = (job for job in self.jobs.values() if job.since is not None)
        return next(({"operation": job.operation, "since": job.since} for job in running), None)


def _kind(error: BaseException) -> str:
    if isinstance(error, Cancelled):
        return CANCELLED
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return MEMORY
    if isinstance(error, torch.distributed.DistError):
        return EXCHANGE
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_GLOO):
        return EXCHANGE
    if isinstance(error, RuntimeError) and "CUDA" in str(error):
        return CUDA
    return REFUSED if isinstance(error, ValueError) else EXCEPTION


def _told(kind: str, error: BaseException) -> str:
    """The end of a sentence that begins with the rank."""
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    if kind == MEMORY:
        return f"ran out of memory: {first}"
    if kind == EXCHANGE:
        return f"could not exchange data with the others: {first}"
    if kind == CUDA:
        return f"had a CUDA error: {first}"
    return str(error) if kind in (REFUSED, CANCELLED) else f"raised {type(error).__name__}: {first}"
