"""How far a processor may run ahead of its GPU."""

import datetime
import math
import time
from collections import deque

import torch
import torch.distributed as dist

AHEAD = 2  # steps: so that the GPU has work while the next one is asked for
LOOK_SECONDS = 0.0002  # of a step that takes a millisecond at least


class Pace:
    """Steps that a GPU has still to do, of which a processor that replays graphs would queue all at once.

    Then progress would be told, and a cancel obeyed, before anything is done; and NCCL, which watches no exchange in a
    graph, would never say that one waits for ever. limit: of a step, once those before are done; None where it waits
    for nobody.
    """

    def __init__(self, device: torch.device, limit: datetime.timedelta | None):
        self.device, self.limit, self.asked = device, limit, deque[torch.cuda.Event]()

    def step(self) -> None:
        """To be called when a step was asked for. Waits until at most AHEAD are not done; raises as `wait`."""
        if self.device.type == "cuda":
            self.asked.append(torch.cuda.current_stream(self.device).record_event())
        self.wait(AHEAD)

    def wait(self, ahead: int = 0) -> None:
        """Until at most so many steps are not done. Raises torch.distributed.DistError past the limit."""
        limit, began = self.limit.total_seconds() if self.limit else math.inf, time.monotonic()
        while len(self.asked) > ahead:
            if self.asked[0].query():
                self.asked.popleft()
                began = time.monotonic()
            elif time.monotonic() > began + limit:
                raise dist.DistError(f"a step is not done after {limit:g} s")
            else:
                time.sleep(LOOK_SECONDS)
