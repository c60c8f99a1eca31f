"""The group of ranks that this process has: at most one, as ranks hold the whole memory of their GPUs.

It lives as long as somebody needs it, and a while longer: what nobody needs any more would keep that memory from all
others.
"""

import logging
import threading
import time
import weakref
from collections.abc import Callable

from .coordinator import Group
from .launch import Setup
from .team import Limits

# To start ranks anew, with all their models, takes far longer than a picture: who changes a setting, or goes back to a
# workflow after a glance at another, shall not wait for that. Who goes on to others has the memory within a minute.
GRACE_SECONDS = 45.0
# From when the user wants memory free. Not at once: a prompt that runs may be between two requests.
FREE_SECONDS = 3.0
LOOK_SECONDS = 0.5


class Current:
    """Methods may be called from any thread. grace, look: GRACE_SECONDS and LOOK_SECONDS."""

    def __init__(self, grace: float = GRACE_SECONDS, look: float = LOOK_SECONDS) -> None:
        self._grace, self._look = grace, look
        self._group: Group | None = None
        self._turn = threading.Lock()
        self._ended = threading.Event()
        self._owners: list[weakref.ref] = []
        self._owned = self._asked = 0.0  # when an owner was last seen, when the group was last asked for
        self._left: tuple[float, float, bool] | None = None
        # Whether a prompt for the group runs, or waits where that is asked: as the server knows, if there is one.
        self.wanted: Callable[[bool], bool] = lambda waiting: False

    def group(self, setup: Setup, limits: Limits | None = None, owner: object = None) -> Group:
        """The group of this setup. One of another, as of fewer GPUs, ends first: its requests fail.

        owner: as long as one that was given for this group lives, the group is needed; without any, until `close`.
        """
        with self._turn:
            return self._taken(setup, limits, owner)

    def begin(self, setup: Setup, owner: object) -> None:
        """Have ranks started for whoever asks for `group` next, unless those of another setup run, which may be needed.
        Waits for a group that ends, not for ranks; what goes wrong, that request is told."""
        with self._turn:
            if self._group is None or self._group.setup == setup:
                self._taken(setup, None, owner).begin()

    def leave(self, seconds: float | None = None, waiting: bool = True) -> None:
        """Nobody needs the group now, owner or not: it ends when for so many seconds (None: GRACE_SECONDS) nobody has
        asked it for anything, once no prompt for it runs, or waits if that shall keep it. A sooner end stands."""
        seconds, left = self._grace if seconds is None else seconds, self._left
        if left is None or seconds < left[1]:
            self._left = time.monotonic(), seconds, waiting

    def stay(self) -> None:
        """It is needed after all: take back `leave`."""
        self._left = None

    def document(self) -> dict | None:
        """The state of the group, without waiting; None where there is none."""
        group = self._group
        return group.document() if group else None

    def close(self) -> None:
        """End the group, if there is one."""
        with self._turn:
            self._end()

    def _taken(self, setup: Setup, limits: Limits | None, owner: object) -> Group:
        """`group`, of whoever has the turn."""
        if self._group is None or self._group.setup != setup:
            self._end()
            self._group, self._ended = Group(setup, limits), threading.Event()
            watch = threading.Thread(
                target=self._watch, args=(self._group, self._ended), name="group-watch", daemon=True
            )
            watch.start()
        if owner is not None and all(each() is not owner for each in self._owners):
            # Not a WeakSet: owners of equal value are not one.
            self._owners = [*(each for each in self._owners if each() is not None), weakref.ref(owner)]
        self._owned = self._asked = time.monotonic()
        return self._group

    def _end(self) -> None:
        self._ended.set()
        if self._group is not None:
            self._group.close()
            self._group, self._owners = None, []

    def _watch(self, group: Group, ended: threading.Event) -> None:
        """End this group when it is no longer needed. Owners are looked at and not called back by: the collector of
        garbage may run on any thread, while it holds any lock."""
        while not ended.wait(self._look):
            with self._turn:
                if not ended.is_set() and self._is_over(group):
                    logging.info("Z-Image-Turbo: multi-gpu is no longer needed: its processes end and free their GPUs.")
                    self._end()

    def _is_over(self, group: Group) -> bool:
        now, used = time.monotonic(), max(group.used(), self._asked)
        if not self._owners or any(each() is not None for each in self._owners):
            self._owned = now
        left = self._left
        if left is not None:
            since, seconds, waiting = left
            if now - max(since, used) >= seconds and not self.wanted(waiting):
                return True
        return now - max(self._owned, used) >= self._grace and not self.wanted(True)


current = Current()
