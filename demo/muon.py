"""The optimisers: orthogonalised momentum for the blocks' matrices, AdamW for everything else."""

import torch
import torch.nn as nn

MATRICES = (".attention.", ".feed_forward.", ".self_attn.", ".mlp.gate", ".mlp.up", ".mlp.down")
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(x: torch.Tensor) -> torch.Tensor:
    """[N, rows, columns] → nearly orthogonal matrices with the same row and column spaces, by Newton-Schulz steps."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.to(torch.bfloat16)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose matrix updates are orthogonalised; matrices of one shape go through together."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                self.state[p].setdefault("momentum", torch.zeros_like(p))
            momenta, gradients = [self.state[p]["momentum"] for p in parameters], [p.grad for p in parameters]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
            by_shape: dict[torch.Size, list] = {}
            for p, update in zip(parameters, updates, strict=True):
                by_shape.setdefault(p.shape, []).append((p, update))
            for shape, pairs in by_shape.items():
                steps = orthogonalise(torch.stack([update for _, update in pairs]))
                scale = -group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                torch._foreach_add_([p for p, _ in pairs], list(steps.unbind(0)), alpha=scale)


def make_optimizers(model: nn.Module, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    matrices, rest = [], []
    for name, p in model.named_parameters():
        (matrices if p.ndim == 2 and any(part in name for part in MATRICES) else rest).append(p)
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=rest[0].is_cuda)
    optimizers = [adam, Muon(matrices, muon_lr)]
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["base"] = group["lr"]
    return optimizers


def set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["base"] * factor
