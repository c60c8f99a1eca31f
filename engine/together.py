"""Ranks that compute one picture together: their process groups, and what they must agree on."""

import datetime

import torch
import torch.distributed as dist

from .sequence import Ranks

PATIENCE = datetime.timedelta(minutes=30)  # while one of them does what the others wait for, as decode a large picture


class Together:
    """The ranks with these numbers, `own` among them or not. All ranks of the job must make it, in the same order, and
    only once.

    limit: of one exchange between their GPUs.
    """

    def __init__(self, members: tuple[int, ...], own: int, device: torch.device, limit: datetime.timedelta):
        self.members, self.leads = members, own == members[0]
        exchange = dist.new_group(list(members), limit)
        self.ranks = Ranks(device, exchange) if own in members else None
        if self.ranks:
            # Of its own kind: what the processors agree on must not wait for what their GPUs have still to do. And not
            # by `new_group`, which splits groups off NCCL's of all ranks, and has those that are no members of one take
            # part in a split whatever its kind is: of gloo's, which the members do not split off, for ever.
            store = dist.PrefixStore(f"control {members}", dist.distributed_c10d._get_default_store())
            self._control = dist.ProcessGroupGloo(store, self.ranks.rank, self.ranks.size, PATIENCE)

    def any(self, wanted: bool) -> bool:
        """Whether one of the ranks wants it. Waits for all of them."""
        return not self.least(not wanted)

    def least(self, number: int) -> int:
        """The least number that one of the ranks gives. Waits for all of them, but for none of their GPUs."""
        said, options = torch.tensor([number], dtype=torch.int32), dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        self._control.allreduce([said], options).wait()
        return said.item()
