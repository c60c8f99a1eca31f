"""Ranks that compute one picture together: their process groups, and what they must agree on."""

import torch
import torch.distributed as dist

from .sequence import Ranks


class Together:
    """The ranks with these numbers, `own` among them or not. All ranks of the job must make it, in the same order."""

    def __init__(self, members: tuple[int, ...], own: int, device: torch.device):
        self.members, self.leads = members, own == members[0]
        exchange = dist.new_group(list(members))
        # Of its own kind: what the processors agree on must not wait for what their GPUs have still to do.
        self._control = dist.new_group(list(members), backend="gloo")
        self.ranks = Ranks(device, exchange) if own in members else None

    def any(self, wanted: bool) -> bool:
        """Whether one of the ranks wants it. Waits for all of them."""
        said = torch.tensor(wanted, dtype=torch.int32)
        dist.all_reduce(said, dist.ReduceOp.MAX, self._control)
        return bool(said)
