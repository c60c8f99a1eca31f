"""What the user sees: numbered steps with their seconds, and errors that come with a remedy."""

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import TextIO


class LauncherError(Exception):
    """A failure that ends the command: ``reason`` says what happened, ``remedy`` what to do, ``details`` is output."""

    def __init__(self, reason: str, remedy: str, details: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
        self.details = details

    def render(self) -> str:
        """Return the text for the terminal, with the tool's own output indented below the reason."""
        lines = [f"Problem: {self.reason}"]
        lines += [f"    | {line}" for line in self.details.splitlines()]
        lines.append(f"What to do: {self.remedy}")
        return "\n".join(lines)


class Step:
    """One running step. ``result`` replaces the word "done"; ``note`` lines are printed below it."""

    def __init__(self, head: str, stream: TextIO) -> None:
        self.result = "done"
        self._head = head
        self._stream = stream
        self._notes: list[str] = []
        self._terminal = stream.isatty()

    def note(self, text: str) -> None:
        self._notes.append(text)

    def live(self, text: str) -> None:
        """Show the newest line of a tool's output behind the step's name (on a terminal only)."""
        if self._terminal:
            line = f"{self._head} {text.strip()}"
            # A line that wraps cannot be taken back.
            self._stream.write(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}")
            self._stream.flush()

    def close(self, result: str, seconds: float) -> None:
        if self._terminal:
            self._stream.write(f"\r\x1b[K{self._head}")
        self._stream.write(f" {result} ({seconds:.1f} s)\n")
        for line in self._notes:
            self._stream.write(f"      {line}\n")
        self._stream.flush()


class Steps:
    """Prints ``[2/6] Installing … done (48.2 s)``, one line a step."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._total = total
        self._number = 0
        self._stream = stream or sys.stdout

    def heading(self, text: str) -> None:
        """Begin a step that prints lines of its own and has no closing word."""
        self._stream.write(f"{self._next()} {text}\n")
        self._stream.flush()

    def _next(self) -> str:
        self._number += 1
        return f"[{self._number}/{self._total}]"

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[Step]:
        """Run a step inside a ``with`` block; the line is closed with its result or "failed", and the seconds."""
        head = f"{self._next()} {text} …"
        self._stream.write(head)
        self._stream.flush()
        step = Step(head, self._stream)
        started = time.monotonic()
        try:
            yield step
        except BaseException:
            step.close("failed", time.monotonic() - started)
            raise
        step.close(step.result, time.monotonic() - started)
