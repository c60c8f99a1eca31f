"""Something that is looked at again and again beside what is measured."""

import threading
import time


class Sampled:
    """Calls `sample` every `interval` seconds, in a thread of its own, from entering to leaving."""

    interval: float

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sampled":
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def now(self) -> float:
        """Seconds since entering."""
        return time.perf_counter() - self._start

    def sample(self) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        while not self._over.wait(self.interval):
            self.sample()
