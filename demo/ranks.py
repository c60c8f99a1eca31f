"""The processes that train together: one a GPU, started by torchrun; a single process is a group of one."""

import os

import torch
import torch.distributed as dist


class Ranks:
    """`index` of this process among `count`. Joining is left to `join`, because data is made by forking before."""

    def __init__(self):
        self.index, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.clock = None

    def join(self, device: torch.device) -> None:
        if self.count > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self.clock = dist.new_group(backend="gloo")  # on the CPU: asking the time must not wait for the GPU

    def leave(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    def agree(self, value: float) -> float:
        """The first process' value, so that all take the same step and stop at the same one."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, 0, group=self.clock)
        return float(shared)

    @torch.no_grad()
    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """The mean over all processes, in place; parameters without a gradient have none anywhere."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.div_(self.count).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
