"""Flow-matching ODEs whose solutions are known."""

import torch

from zimage_turbo.engine import ode


class Gaussian:
    """Data of a normal distribution: its flow from any noise is known at every sigma, and smooth down to 0."""

    mean, deviation = 0.7, 0.3

    def __init__(self):
        self.noise = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The expectation of the data under x = (1 - sigma) · data + sigma · noise."""
        sigma = sigma.view(-1, 1, 1, 1)
        gain = (1 - sigma) * self.deviation**2 / ((1 - sigma) ** 2 * self.deviation**2 + sigma**2)
        return self.mean + gain * (x - (1 - sigma) * self.mean)

    def exact(self, sigma: float) -> torch.Tensor:
        return (1 - sigma) * self.mean + ((1 - sigma) ** 2 * self.deviation**2 + sigma**2) ** 0.5 * self.noise

    def levels(self, steps: int, shift: float = 3.0) -> torch.Tensor:
        """As `ode.sigmas`, but in fp64 and of places that are not rounded."""
        time = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return shift * time / (1 + (shift - 1) * time)

    def error(self, solver: str, levels: torch.Tensor, tolerance: float = 0.0) -> float:
        end, _ = ode.solve(solver, self.denoise, self.exact(levels[0].item()), levels, tolerance)
        return (end - self.exact(0.0)).square().mean().sqrt().item()

    def errors(self, solver: str, counts: tuple[int, ...]) -> list[float]:
        """At the end of runs of so many steps."""
        return [self.error(solver, self.levels(steps)) for steps in counts]


gaussian = Gaussian()
