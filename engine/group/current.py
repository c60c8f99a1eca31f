"""The group of ranks that this process has: at most one, as ranks hold the whole memory of their GPUs."""

import threading

from .coordinator import Group
from .launch import Setup
from .team import Limits


class Current:
    """Methods may be called from any thread."""

    def __init__(self) -> None:
        self._group: Group | None = None
        self._turn = threading.Lock()

    def group(self, setup: Setup, limits: Limits | None = None) -> Group:
        """The group of this setup. One of another, as of fewer GPUs, ends first: its requests fail."""
        with self._turn:
            if self._group is None or self._group.setup != setup:
                self._end()
                self._group = Group(setup, limits)
            return self._group

    def document(self) -> dict | None:
        """The state of the group, without waiting; None where there is none."""
        group = self._group
        return group.document() if group else None

    def close(self) -> None:
        """End the group, if there is one."""
        with self._turn:
            self._end()

    def _end(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


current = Current()
