"""Latents of rendered scenes on the training device, one shelf a picture size, renewed while training goes on."""

import random

import torch

from .autoencoder import Autoencoder
from .dataset import SQUARE, Arrays, take
from .picture import render

SHORT = 32
CHUNK = 64  # pictures encoded at once, always as many: convolutions are planned anew for every other shape
KEPT = ("tokens", "length", "shape", "box", "sign")  # what training needs of a scene beside its picture


class Shelf:
    def __init__(self, size: tuple[int, int], data: Arrays, device: torch.device):
        self.size, self.data, self.device = size, data, device
        self.capacity, self.filled, self.next = len(data["length"]), 0, 0
        width, height = size
        self.latents = torch.zeros(self.capacity, 16, height // 8, width // 8, dtype=torch.bfloat16, device=device)
        self.rows = {name: data[name].to(device) for name in KEPT}
        self.by_length = {}

    @torch.no_grad()
    def refill(self, count: int, vae: Autoencoder, atlas: torch.Tensor) -> None:
        """Encode the next `count` scenes, in whole chunks; past the end nothing is left to do."""
        width, height = self.size
        dtype = next(vae.parameters()).dtype
        end = min(self.capacity, self.next + count) // CHUNK * CHUNK
        for first in range(self.next, end, CHUNK):
            rows = torch.arange(first, first + CHUNK)
            pictures = render(take(self.data, rows, self.device), width, height, atlas)
            pictures = pictures.to(dtype).contiguous(memory_format=torch.channels_last)
            self.latents[first : first + CHUNK] = vae.latents(pictures).to(torch.bfloat16)
        self.next = self.filled = end
        short = self.rows["length"][:end] <= SHORT
        self.by_length = {SHORT: short.nonzero().flatten(), 2 * SHORT: (~short).nonzero().flatten()}
        self.short_share = len(self.by_length[SHORT]) / max(1, end)

    def batch(self, count: int, rng: random.Random) -> tuple[torch.Tensor, Arrays, int]:
        """Latents [count, 16, H / 8, W / 8], their rows and the padded prompt length, which all share."""
        words = SHORT if rng.random() < self.short_share or not len(self.by_length[2 * SHORT]) else 2 * SHORT
        pool = self.by_length[words]
        picked = pool[torch.randint(len(pool), (count,), device=self.device)]
        return self.latents[picked].float(), {name: values[picked] for name, values in self.rows.items()}, words


class Shelves:
    """`square_share` of the batches are of the usual size, the rest of any other."""

    def __init__(
        self, dataset: dict[tuple[int, int], Arrays], vae: Autoencoder, atlas: torch.Tensor, square_share: float
    ):
        self.vae, self.atlas, self.square_share = vae, atlas, square_share
        self.shelves = {size: Shelf(size, data, atlas.device) for size, data in dataset.items()}
        self.others = [size for size in dataset if size != SQUARE]
        self.turn = 0

    def refill(self, square_count: int, other_count: int, others: int) -> None:
        """New pictures for the usual size and, in turn, for `others` of the other sizes."""
        self.shelves[SQUARE].refill(square_count, self.vae, self.atlas)
        for _ in range(others):
            self.shelves[self.others[self.turn % len(self.others)]].refill(other_count, self.vae, self.atlas)
            self.turn += 1

    @property
    def pictures(self) -> int:
        return sum(shelf.filled for shelf in self.shelves.values())

    def pick(self, rng: random.Random) -> Shelf:
        """A shelf that has pictures, by the wanted shares."""
        ready = [size for size in self.others if self.shelves[size].filled]
        return self.shelves[SQUARE if not ready or rng.random() < self.square_share else rng.choice(ready)]
