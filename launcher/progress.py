"""Shows a running prompt: one line a node, which counts its steps in place on a terminal."""

import time
from collections.abc import Callable, Mapping
from typing import TextIO

PLAIN_INTERVAL = 1.0
"""Seconds between two step lines where a line cannot be rewritten (a log file)."""


class Progress:
    """Prints ``  sampler: step 3/8`` lines. ``titles`` gives each node id the name the editor shows."""

    def __init__(self, titles: Mapping[str, str], stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._titles = titles
        self._stream = stream
        self._clock = clock
        self._terminal = stream.isatty()
        self._node: str | None = None
        self._started = 0.0
        self._printed = 0.0
        self._steps = ""

    def cached(self, nodes: list[str]) -> None:
        self._stream.write(f"  unchanged, not run again: {', '.join(map(self._title, nodes))}\n")

    def running(self, node: str) -> None:
        """Begin the line of ``node`` and end the one before. A node may be announced more than once."""
        if node == self._node:
            return
        self.end()
        self._node, self._started, self._printed, self._steps = node, self._clock(), float("-inf"), ""
        self._show(f"  {self._title(node)} …")

    def step(self, node: str, value: float, maximum: float) -> None:
        self.running(node)
        self._steps = f": step {value:g}/{maximum:g}"
        now = self._clock()
        if self._terminal:
            self._show(f"  {self._title(node)}{self._steps}")
        elif value < maximum and now - self._printed >= PLAIN_INTERVAL:
            self._printed = now
            self._stream.write(f"  {self._title(node)}{self._steps}\n")
            self._stream.flush()

    def end(self) -> None:
        """End the current line with the node's time."""
        if self._node is None:
            return
        text = f"  {self._title(self._node)}{self._steps} ({self._clock() - self._started:.1f} s)"
        self._stream.write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")
        self._stream.flush()
        self._node = None

    def _title(self, node: str) -> str:
        # A node made at run time by another one is called "<its maker>.<number>…".
        return self._titles.get(node) or self._titles.get(node.split(".")[0], node)

    def _show(self, text: str) -> None:
        if self._terminal:
            self._stream.write(f"\r\x1b[K{text}")
            self._stream.flush()
