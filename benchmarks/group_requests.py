"""Requests of a group of ranks at random, and what befalls them on their way."""

import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from ..engine import ode, plan, spread, text
from ..engine.group.coordinator import Group
from .cards import decoded, image
from .contestants import prompt_text

STEPS = 4  # a group does nothing else for more of them
LIMIT = 600.0  # seconds
MODEL = "model"  # what ranks keep it under
MOST = 5  # pictures of a request
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)


class Cancel(Exception):
    """What stands for a user's interruption."""


@dataclass(frozen=True)
class Request:
    """Pictures of one size, each of a prompt and seed, and how ranks share them: whole, or each split over all."""

    images: list[dict]
    split: str

    @classmethod
    def drawn(cls, draw: random.Random, clip, sides: range) -> "Request":
        """One at random. sides: of pictures, in pixels."""
        images, size = [], (draw.choice(sides), draw.choice(sides))
        for _ in range(draw.randint(1, MOST)):
            seed = draw.getrandbits(32)
            words = ". ".join(prompt_text(draw.getrandbits(16)) for _ in range(draw.randint(1, 4)))
            images.append(image(seed, size, text.encode(clip, words)))
        return cls(images, draw.choice((plan.IMAGES, plan.SEQUENCE)))

    def run(self, group: Group, on_step: Callable = lambda *_: None) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [B, 16, h, w] and pictures [B, H, W, 3], as our sampler and the VAE of multi-gpu make them. Ranks
        that share pictures must have met."""

        def choose(images: int, ranks: int) -> plan.Plan:
            return plan.choose(images, [range(ranks)], self.split)

        common = {"key": MODEL, "sigmas": ode.sigmas(STEPS), "solver": "official", "tolerance": ode.TOLERANCE}
        results = spread.draw(group, common | {"previews": False}, self.images, LIMIT, on_step, None, choose)
        latents = torch.cat([told["latent"] for told in results])
        return latents, decoded(group, MODEL, latents)


@dataclass
class Disturbance:
    """A signal to a rank, or a cancel, after so many steps of a request; it never comes if that ends before.

    delay: seconds until the signal, which so falls at any point of a step. at: when it came; None before.
    """

    group: Group
    victim: int | None
    how: signal.Signals | None
    cancels: bool
    after: int
    delay: float
    at: float | None = None
    steps: int = 0
    timer: threading.Timer | None = None

    @classmethod
    def drawn(cls, draw: random.Random, group: Group, images: int, faults: float, cancels: float) -> "Disturbance":
        """One at random. faults, cancels: shares of requests."""
        hits, stops = draw.random() < faults, draw.random() < cancels
        victim, how = draw.randrange(len(group.setup.devices)), draw.choice(SIGNALS)
        after, delay = draw.randrange(STEPS * images), draw.random() * 0.3
        return cls(group, victim if hits else None, how if hits else None, stops and not hits, after, delay)

    def on_step(self, *_) -> None:
        self.steps += 1
        if self.steps != self.after + 1:
            return
        if self.how:
            self.timer = threading.Timer(self.delay, self._strike)
            self.timer.start()
        if self.cancels:
            self.at = time.monotonic()
            raise Cancel

    def join(self) -> None:
        """Wait for a signal that is on its way."""
        if self.timer:
            self.timer.join()

    def _strike(self) -> None:
        pids = {rank["rank"]: rank["pid"] for rank in self.group.document()["ranks"]}
        psutil.Process(pids[self.victim]).send_signal(self.how)
        self.at = time.monotonic()
