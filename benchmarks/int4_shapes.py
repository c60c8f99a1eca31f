"""Fit the 32 shapes of the INT4 format (kernels/int4_shapes.py) to a stated mixture of weight distributions.

Run: python benchmarks/int4_shapes.py [--groups 100000] [--rounds 150] [--restarts 6] [--seed 0]
Prints the relative L2 error on fresh samples of each distribution, then the constant in hexadecimal.

Lloyd's algorithm over groups of 16 weights: each group goes to the shape and power of two that fit it best, each level
moves to the mean of what it stands for, weighted by its share in the squared error. Levels are kept at 4 significant
bits, which is what an FP8 (e4m3) number holds, and away from 0, in the last rounds; a shape that few groups want
starts anew near one that many want.
"""

import argparse

import torch

GROUP, LEVELS, SHAPES = 16, 16, 32
GRID = 512  # steps of a unit when distances are looked up
LEAST = 1 / 64  # magnitude of a level: 7 binades below, its FP8 number is still normal
STEPS = (-1, 0, 1)  # binades beside that of a group's largest weight that can win
MIXTURE = {"gaussian": 1.0, "t4": 0.3, "t2.5": 0.1, "outlier columns": 0.2, "laplace": 0.3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=100000, help="groups of 16 weights to fit to, before the mixture")
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--restarts", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    groups = training_set(arguments.groups)
    held_out = {name: normalised(weight) for name, weight in samples(96, 2048).items()}
    best = None
    for restart in range(arguments.restarts):
        shapes = fit(groups, arguments.rounds)
        loss = relative_error(groups, shapes)
        print(f"restart {restart}: loss {loss:.5f}", flush=True)
        if best is None or loss < best[0]:
            best = loss, shapes
    for name, sample in held_out.items():
        print(f"{name}: {relative_error(sample, best[1]):.4f}")
    for shape in codes(best[1]):
        print(f'    "{bytes(shape.tolist()).hex()}",')


def samples(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """One weight [rows, columns] float32 of each distribution, from torch's global generator."""
    loud = torch.where(torch.arange(columns) % 128 == 0, 8.0, 1.0)
    return {
        "gaussian": torch.randn(rows, columns),
        "t4": torch.distributions.StudentT(4.0).sample((rows, columns)),
        "t2.5": torch.distributions.StudentT(2.5).sample((rows, columns)),
        "outlier columns": torch.randn(rows, columns) * loud,
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((rows, columns)),
    }


def normalised(weight: torch.Tensor) -> torch.Tensor:
    """Groups [n, 16] of a weight scaled to a mean square of 1, so that squared errors are relative ones."""
    return (weight / weight.square().mean().sqrt()).reshape(-1, GROUP)


def training_set(groups: int) -> torch.Tensor:
    """Groups [n, 16] of the mixture."""
    parts = []
    for name, weight in samples(groups // 128 + 1, 2048).items():
        part = normalised(weight)
        parts.append(part[torch.randperm(len(part))[: int(groups * MIXTURE[name])]])
    return torch.cat(parts)


def assign(groups: torch.Tensor, shapes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each group the least squared error [n], the shape [n] and the exponent [n] that give it.

    shapes is [32, 16] float32 in (-2, 2): a group whose exponent is e is compared with shape * 2^e. Distances are
    looked up on a grid far finer than the levels, for all shapes at once.
    """
    grid = torch.arange(-4 * GRID, 4 * GRID + 1) / GRID
    distance = (grid[:, None, None] - shapes).abs().amin(-1).square()
    top = torch.floor(torch.log2(groups.abs().amax(1).clamp(min=1e-12)))
    error = torch.full(top.shape, float("inf"))
    shape, exponent = torch.zeros(top.shape, dtype=torch.long), torch.zeros_like(top)
    for step in STEPS:
        unit = torch.exp2(top + step)
        cell = (groups / unit[:, None] * GRID).round().long() + 4 * GRID
        trial, trial_shape = torch.nn.functional.embedding_bag(cell, distance, mode="sum").min(1)
        trial = trial * unit.square()
        better = trial < error
        error = torch.where(better, trial, error)
        shape = torch.where(better, trial_shape, shape)
        exponent = torch.where(better, top + step, exponent)
    return error, shape, exponent


def fit(groups: torch.Tensor, rounds: int) -> torch.Tensor:
    """The shapes [32, 16] after Lloyd's algorithm from a random start."""
    tops = 0.9 + torch.rand(SHAPES, 1)
    sides = torch.where(torch.arange(SHAPES) % 2 == 0, 1.0, -1.0)[:, None]
    shapes = tops * sides * torch.arange(-8, 8) / 8 * (0.9 + 0.2 * torch.rand(SHAPES, LEVELS))
    shapes = shapes.sort(1).values
    for round_ in range(rounds):
        error, shape, exponent = assign(groups, shapes)
        scaled = groups * torch.exp2(-exponent)[:, None]
        weight = torch.exp2(2 * exponent)[:, None].expand_as(groups)
        middles = (shapes[:, 1:] + shapes[:, :-1]) / 2
        level = torch.searchsorted(middles[shape], scaled)
        index = (shape[:, None] * LEVELS + level).flatten()
        total = torch.zeros(SHAPES * LEVELS).index_add_(0, index, (scaled * weight).flatten())
        share = torch.zeros(SHAPES * LEVELS).index_add_(0, index, weight.flatten())
        moved = torch.where(share > 0, total / share.clamp(min=1e-12), shapes.flatten()).view(SHAPES, LEVELS)
        if round_ < rounds * 2 // 3:
            cost = torch.zeros(SHAPES).index_add_(0, shape, error)
            for dead in (cost < 0.1 * cost.mean()).nonzero().flatten().tolist():
                moved[dead] = moved[cost.argmax()] * (0.95 + 0.1 * torch.rand(LEVELS))
        else:
            moved = rounded(moved)
        shapes = moved.sort(1).values
    return shapes


def rounded(shapes: torch.Tensor) -> torch.Tensor:
    """shapes with every level at the nearest number of 4 significant bits from 1/64 to below 2, of either sign."""
    mantissa, exponent = torch.frexp(shapes)
    nearest = torch.ldexp(torch.round(mantissa * 16) / 16, exponent)
    return torch.copysign(nearest.abs().clamp(LEAST, 1.875), shapes)


def codes(shapes: torch.Tensor) -> torch.Tensor:
    """The FP8 (e4m3fn) bytes [32, 16] of shapes * 128."""
    return (shapes * 128).to(torch.float8_e4m3fn).view(torch.uint8)


def relative_error(groups: torch.Tensor, shapes: torch.Tensor) -> float:
    return (assign(groups, shapes)[0].sum() / groups.square().sum()).sqrt().item()


if __name__ == "__main__":
    main()
