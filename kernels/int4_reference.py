"""The INT4 format (int4.py) in plain torch: the search for the best codes, and the decoding."""

from functools import lru_cache

import torch

from .arguments import FP8
from .int4_shapes import DROPS, levels, table

GROUP = 16
CHUNK = 1 << 22  # weights that the quantiser works on at once
GRID = 4  # steps of a unit
TOP = 8  # a row's largest magnitude, over its scale, lies in [2^(TOP - 1), 2^TOP)


def row_scales(weight: torch.Tensor) -> torch.Tensor:
    """The powers of two [N] that bring the largest magnitude of each row of weight [N, K] float32 below 2^TOP."""
    absmax = weight.abs().amax(1)
    exponent = (torch.frexp(absmax).exponent - TOP).clamp(min=-126)
    return torch.where(absmax > 0, torch.ldexp(torch.ones_like(absmax), exponent), 0.0)


def search(weight: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes [N, K/2], groups [N, K/16] and scales [N] of weight [N, K] float32; seed != 0 rounds stochastically."""
    scales = row_scales(weight)
    units = (weight / torch.where(scales > 0, scales, 1.0)[:, None]).view(-1, GROUP)
    shape, drop = _best_groups(units)
    codes = _nearest(units, shape, drop) if seed == 0 else _neighbour(units, shape, drop, seed)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    groups = (shape << 3 | drop).to(torch.uint8)
    return packed.view(len(weight), -1), groups.view(len(weight), -1), scales


def expand(codes: torch.Tensor, groups: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Decodes into out [N, K]: FP8 without the scales, or a wider float type with them."""
    rows = max(1, CHUNK // out.shape[1])
    values = table(codes.device)
    for start in range(0, len(out), rows):
        chunk = slice(start, start + rows)
        code = torch.stack([codes[chunk] & 15, codes[chunk] >> 4], -1).view(*groups[chunk].shape, GROUP)
        byte = values[groups[chunk].long()].gather(-1, code.long()).view(-1, out.shape[1]).view(FP8)
        if out.dtype == FP8:
            out[chunk] = byte
        else:
            out[chunk] = byte.float() * scales[chunk, None]
    return out


@lru_cache(maxsize=32)
def _grid_errors(device: torch.device) -> torch.Tensor:
    """For numbers on a grid from -512 to 512 the squared distance to the nearest level of each shape: [4097, 32]."""
    with torch.inference_mode(False):
        grid = torch.arange(-512 * GRID, 512 * GRID + 1, device=device) / GRID
        return (grid[:, None, None] - levels(device)).abs().amin(-1).square()


def _best_groups(units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The shape [n] and drop [n] of least squared error for groups [n, 16] over their row's scale.

    Errors are looked up on a grid far finer than the levels, for all shapes at once: measured, that costs no accuracy.
    """
    errors = _grid_errors(units.device)
    own = TOP - torch.frexp(units.abs().amax(1)).exponent
    best = torch.full((len(units),), float("inf"), device=units.device)
    shape, drop = torch.zeros_like(own), torch.zeros_like(own)
    for step in (-1, 0, 1):
        trial_drop = (own + step).clamp(0, DROPS - 1)
        cell = (torch.ldexp(units, trial_drop[:, None]) * GRID).round().long() + 512 * GRID
        trial, trial_shape = torch.nn.functional.embedding_bag(cell, errors, mode="sum").min(1)
        trial = torch.ldexp(trial, -2 * trial_drop)
        better = trial < best
        best = torch.where(better, trial, best)
        shape = torch.where(better, trial_shape.to(shape.dtype), shape)
        drop = torch.where(better, trial_drop, drop)
    return shape, drop


def _nearest(units: torch.Tensor, shape: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
    value = levels(units.device)
    middle = ((value[:, 1:] + value[:, :-1]) / 2)[shape]
    return torch.searchsorted(middle, torch.ldexp(units, drop[:, None]))


def _neighbour(units: torch.Tensor, shape: torch.Tensor, drop: torch.Tensor, seed: int) -> torch.Tensor:
    """One of the two levels around each weight, the upper one with the probability that keeps the mean."""
    value = levels(units.device)[shape]
    scaled = torch.ldexp(units, drop[:, None])
    lower = (torch.searchsorted(value, scaled, right=True) - 1).clamp(0, GROUP - 2)
    below, above = value.gather(1, lower), value.gather(1, lower + 1)
    generator = torch.Generator(units.device).manual_seed(seed)
    chance = torch.rand(units.shape, generator=generator, device=units.device)
    return lower + (chance < (scaled - below) / (above - below)).long()
