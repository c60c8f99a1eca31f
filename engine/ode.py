"""The sampler's arithmetic, without ComfyUI: the schedule, and solvers by name for the ODE of flow matching.

The ODE is dx/dsigma = (x - x0) / sigma, where x0 is the clean latent that the model predicts from x and sigma. A solver
takes x [batch, …] from the first of the given levels to exactly the last, and asks for velocities on the way:

    from zimage_turbo.engine import ode

    def coarse(run, x, levels):  # Euler's method on every second level, and the last
        for level, after in itertools.pairwise([*levels[:-1:2], levels[-1]]):
            x = x + run.velocity(x, level) * (after - level)
        return x

    ode.register("coarse", coarse)

It can then be chosen by its name in the nodes. Counting, previews, interruption and the report are the run's.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from .adams import largest_rms
from .adaptive import adaptive
from .implicit import implicit

SHIFT = 3.0
NFE = 8
TRAINING_STEPS = 1000
TOLERANCE = 0.05
OFFICIAL = "official"
DIGITS = 6  # of numbers in a report: what fp32 has

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
OnEvaluation = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], object]


def sigmas(steps: int = NFE, denoise: float = 1.0, shift: float = SHIFT) -> torch.Tensor:
    """Descending noise levels [steps + 1] fp32 from 1 to 0, every step one model evaluation (NFE).

    Evenly spaced training timesteps t, each shifted: sigma = shift · t / (1 + (shift - 1) · t); the official schedule
    of Z-Image-Turbo at 8 steps and shift 3. ``denoise`` below 1 keeps the number of steps and starts later on the curve
    of steps / denoise steps. denoise 0 gives an empty schedule. Raises ValueError for a denoise outside 0 to 1, as NaN.
    """
    if not 0.0 <= denoise <= 1.0:
        raise ValueError(f"denoise is {denoise}. Use a number from 0 to 1.")
    if denoise == 0.0:
        return torch.zeros(0)
    total = steps if denoise > 0.9999 else int(steps / denoise)
    places = [TRAINING_STEPS - int(step * TRAINING_STEPS / total) for step in range(total)]
    time = torch.tensor(places, dtype=torch.float32) / TRAINING_STEPS
    levels = shift * time / (1 + (shift - 1) * time)
    return torch.cat((levels, torch.zeros(1)))[-(steps + 1) :]


@dataclass(frozen=True)
class Report:
    """What a run did. sigmas: where the model was evaluated, then where the run ended; errors: estimates of the local
    error of each step but the last, as RMS in latents, whose own is about 1; of a batch that of the worst picture."""

    solver: str
    budget: int
    tolerance: float
    nfe: int
    sigmas: tuple[float, ...]
    errors: tuple[float, ...]

    def as_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def of(cls, told: dict) -> "Report":
        """The report that `as_dict` gave, after a way through JSON."""
        return cls(**told | {name: tuple(told[name]) for name in ("sigmas", "errors")})

    def __str__(self) -> str:
        """For the node: three lines, without the tolerance, which only some solvers heed."""
        numbers = {"sigmas": self.sigmas, "estimated errors": self.errors}
        lines = [
            f"{name}: {' '.join(f'{value:.3g}' for value in values)}" for name, values in numbers.items() if values
        ]
        return "\n".join([f"{self.solver}: {self.nfe} of {self.budget} evaluations", *lines])


def common(reports: Sequence[Report]) -> list[Report]:
    """Of pictures that were drawn one by one: one report with the worst errors if all took the same evaluations, or
    each one's own."""
    if len({each.sigmas for each in reports}) > 1:
        return list(reports)
    errors = tuple(map(max, zip(*(each.errors for each in reports), strict=True)))
    return [replace(reports[0], errors=errors)]


def as_json(reports: Sequence[Report]) -> str:
    """For a file: one report as an object, several as a list."""
    told = [report.as_dict() for report in reports]
    return json.dumps(told[0] if len(told) == 1 else told)


class Run:
    """A run of a solver: its evaluations, held to the budget and counted, and what it notes."""

    def __init__(self, denoise: Denoise, budget: int, tolerance: float, on_evaluation: OnEvaluation | None = None):
        self.budget, self.tolerance = budget, tolerance
        self._denoise, self._on_evaluation = denoise, on_evaluation
        self._levels: list[torch.Tensor] = []
        self._errors: list[torch.Tensor] = []

    def velocity(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """dx/dsigma at x [batch, …] and the level [] above 0, in the shape of x: one evaluation.

        Raises RuntimeError beyond the budget, and whatever on_evaluation raises to stop the run.
        """
        if len(self._levels) == self.budget:
            raise RuntimeError(f"The solver asked for more than its {self.budget} evaluations.")
        clean = self._denoise(x, level * x.new_ones([x.shape[0]]))
        if self._on_evaluation is not None:
            self._on_evaluation(len(self._levels), clean, x, level)
        self._levels.append(level)
        return (x - clean) / level

    def note(self, error: torch.Tensor) -> None:
        """For the report: an estimate [] of a step's local error."""
        self._errors.append(error)

    def measured(self, error: torch.Tensor, x: torch.Tensor) -> float:
        """An estimate [] as a number, which waits for the device. Raises ValueError if x is no longer finite."""
        number = float(error)
        if not math.isfinite(number):
            require_finite(x)
        return number

    def report(self, solver: str, end: torch.Tensor) -> Report:
        sigmas = torch.stack([*self._levels, end]).tolist()
        errors = torch.stack(self._errors).tolist() if self._errors else []
        return Report(solver, self.budget, self.tolerance, len(self._levels), _rounded(sigmas), _rounded(errors))


Solver = Callable[[Run, torch.Tensor, torch.Tensor], torch.Tensor]


def register(name: str, solver: Solver) -> None:
    """Adds a solver: solver(run, x, levels [steps + 1]) → x at the last level. Raises ValueError on a used name."""
    if name in SOLVERS:
        raise ValueError(f"The solver name {name!r} is taken; taken are {', '.join(SOLVERS)}.")
    SOLVERS[name] = solver


def solve(
    solver: str,
    denoise: Denoise,
    x: torch.Tensor,
    levels: torch.Tensor,
    tolerance: float = TOLERANCE,
    on_evaluation: OnEvaluation | None = None,
) -> tuple[torch.Tensor, Report]:
    """x [batch, …] taken from the first of the levels [steps + 1] to the last, with one evaluation a step at most.

    denoise(x, sigma [batch]) returns the predicted clean latent x0 with the shape of x. on_evaluation(number, x0, x,
    sigma []) is called after each; raising in it stops the run. tolerance: for solvers that heed it, the local error of
    a step, as RMS in latents. Raises ValueError for an unknown solver, levels that it cannot take, and NaN or infinity.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}, but there is no such solver. Choose one of {', '.join(SOLVERS)}.")
    run = Run(denoise, len(levels) - 1, tolerance, on_evaluation)
    x = SOLVERS[solver](run, x, levels)
    require_finite(x)
    return x, run.report(solver, levels[-1])


def official(run: Run, x: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Euler's method, one evaluation a step: to the bit what the host's euler gives.

    Errors noted, which steer nothing: half of what the velocity changes over a step, times its length.
    """
    before = None
    for step in range(len(levels) - 1):
        velocity = run.velocity(x, levels[step])
        if before is not None:
            run.note(largest_rms((velocity - before) * (levels[step] - levels[step - 1]) / 2))
        x = x + velocity * (levels[step + 1] - levels[step])
        before = velocity
    return x


def require_finite(x: torch.Tensor) -> None:
    """Raises ValueError if x has NaN or infinity."""
    if not torch.isfinite(x).all():
        raise ValueError(
            "The sampler's result has NaN or infinite values: the model overflowed. Set the loader's precision to bf16 "
            "or fp32."
        )


def _rounded(values: list[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.{DIGITS}g}") for value in values)


SOLVERS: dict[str, Solver] = {OFFICIAL: official, "implicit": implicit, "adaptive": adaptive}
OWN = frozenset(SOLVERS)  # without those that others register, which no other process has
