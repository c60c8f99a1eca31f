"""The rows of multi_gpu.py: what each is of, in which order, and how it is measured."""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ..engine import devices, plan, text, topology
from ..engine.catalogue import Parts
from ..engine.group.coordinator import Group
from .card_log import CardLog
from .cards import Cards, image, setup, spread_of, times
from .contestants import prompt_text
from .gate import FACTOR

A_CARD = (4, 1, 2)  # pictures
EXACT = 1e-5  # error that sums in another order make in fp32
REPLAYED = 3  # draws of one evaluation: eager, captured, replayed
Step = tuple[str, Callable[[], object]]


class GroupRows:
    """ranks: their devices; counts: how many of them draw; keep(row): what to do with each row."""

    def __init__(self, parts: Parts, ranks: Sequence[str], counts: Sequence[int], keep: Callable[[dict], object]):
        self.parts, self.ranks, self.counts, self.keep = parts, tuple(ranks), counts, keep
        self.cards: Cards | None = None
        self.wrong: set[str] = set()
        self.exact: torch.Tensor | None = None
        self.alone: dict[tuple, Any] = {}  # what one GPU gave, which more are held against
        gpus = topology.read().gpus if self.ranks[0] != devices.CPU else ()
        self.uuids = [gpus[int(rank.removeprefix("cuda:"))].uuid for rank in self.ranks] if gpus else []

    def __enter__(self) -> "GroupRows":
        clip = text.load_text_encoder(self.parts.text_encoder, None, [], "auto", False, 0)
        words = map(prompt_text, range(max(A_CARD) * len(self.ranks)))
        self.prompts = [text.encode(clip, each) for each in words]
        return self

    def __exit__(self, *_: object) -> None:
        if self.cards:
            self.cards.group.close()

    def run(self, steps: Iterable[Step], seconds: float) -> list[str]:
        """Take the steps that begin before so many seconds are over. Returns what was left out."""
        end, left_out = time.monotonic() + seconds, []
        for name, step in steps:
            if time.monotonic() > end:
                left_out.append(name)
            else:
                step()
        return left_out

    def steps(self, precisions: Sequence[str], sizes: Sequence[int]) -> Iterator[Step]:
        """What to measure, by weight. A precision that draws wrong pictures has no further steps."""
        size, first = sizes[0], precisions[0]
        yield "start", functools.partial(self.start, first, size)
        for precision in precisions:
            yield f"parity, {precision}", functools.partial(self.parity, precision, size)
            if precision in self.wrong or self.exact is None:
                continue
            yield from self.images_steps(precision, size, A_CARD[:1])
            yield from self.latency_steps(precision, sizes[:1])
            if precision == first:
                yield "recovery", functools.partial(self.recovery, precision, size)
                yield "second start", functools.partial(self.start, precision, None)
            yield from self.latency_steps(precision, sizes[1:])
            yield from self.images_steps(precision, size, A_CARD[1:])

    def images_steps(self, precision: str, size: int, counts: Iterable[int]) -> Iterator[Step]:
        for a_card, gpus in itertools.product(counts, self.counts):
            name = f"{a_card} pictures a card on {gpus}, {precision}"
            yield name, functools.partial(self.images, precision, gpus, a_card, size)

    def latency_steps(self, precision: str, sizes: Iterable[int]) -> Iterator[Step]:
        for size, gpus in itertools.product(sizes, self.counts):
            yield f"latency of {size} on {gpus}, {precision}", functools.partial(self.latency, precision, gpus, size)

    def start(self, precision: str, exact_size: int | None) -> None:
        """A new group, in place of any other: to where ranks are ready, and then to where they hold the models.

        exact_size: of what is first evaluated in fp32, between the two, as the measure for all precisions.
        """
        if self.cards:
            self.cards.group.close()
        began = time.perf_counter()
        self.cards = Cards(Group(setup(self.ranks)), self.parts.diffusion_model, self.parts.vae)
        self.cards.group.start()
        ready = time.perf_counter() - began
        if exact_size:
            self.cards.load_first("fp32")
            self.exact = self.evaluated(exact_size, 1)
        load = self.cards.load(precision)
        said = f"{ready:.1f} s to ready, {load:.1f} s to hold the models{'' if exact_size else ', read before'}"
        row = {"what": "start", "precision": precision, "gpus": len(self.ranks), "weights_cached": not exact_size}
        self.keep(row | {"ready_s": ready, "load_s": load, "seconds": ready + load, "said": said})

    def parity(self, precision: str, size: int) -> None:
        """Whether all ranks draw what the first draws, and together what it draws up to rounding."""
        self.hold(precision)
        gpus, images = len(self.ranks), self.requests(2 * len(self.ranks), size)
        same = _same(self.cards.pictures(images, 1), self.cards.pictures(images, gpus))
        row = {"what": "parity", "precision": precision, "size": size}
        said = f"{same} of {len(images)} pictures are those of one GPU"
        self._judged(row | {"gpus": gpus, "split": plan.IMAGES, "gate": same == len(images), "said": said})
        one = self.evaluated(size, 1)
        own = _distance(one, self.exact)
        for count in self.counts[1:]:
            together = self.evaluated(size, count)
            found = {"own_error": own, "error": _distance(together, self.exact), "bound": max(FACTOR * own, EXACT)}
            found |= {"difference": _distance(together, one), "split": plan.SEQUENCE, "gpus": count}
            said = "together an error of {error:.2e}, alone {own_error:.2e}, between them {difference:.2e}"
            self._judged(row | found | {"gate": found["error"] <= found["bound"], "said": said.format(**found)})

    def _judged(self, row: dict) -> None:
        if not row["gate"]:
            self.wrong.add(row["precision"])
        self.keep(row)

    def images(self, precision: str, gpus: int, a_card: int, size: int) -> None:
        """Denoise and decode of so many whole pictures on each GPU, from the request to the last picture."""
        self.hold(precision)
        draw = functools.partial(self.cards.pictures, self.requests(gpus * a_card, size), gpus)
        draw()
        with CardLog(self.uuids[:gpus]) as log:
            found = spread_of("all", times(draw))
        rate = gpus * a_card / found["all_p50_s"]
        row = {"what": "images", "precision": precision, "gpus": gpus, "a_card": a_card, "size": size}
        row |= {"images_per_s": rate, "ranks_mib": self.cards.memory()[:gpus]} | log.summary() | found
        if gpus == 1:
            self.alone["images", precision, a_card] = rate
        elif base := self.alone.get(("images", precision, a_card)):
            row |= {"efficiency": rate / (gpus * base)}
        self.keep(row)

    def latency(self, precision: str, gpus: int, size: int) -> None:
        """One picture, by all of so many GPUs together."""
        self.hold(precision)
        given = self.requests(1, size), gpus, self.joined(gpus)
        latent = self.cards.drawn(*given)
        row = {"what": "latency", "precision": precision, "gpus": gpus, "size": size}
        row |= spread_of("denoise", times(lambda: self.cards.drawn(*given)))
        row |= spread_of("picture", times(lambda: self.cards.pictures(*given)))
        if gpus == 1:
            self.alone["latency", precision, size] = row["denoise_p50_s"], latent
        elif base := self.alone.get(("latency", precision, size)):
            row |= {"speed_up": base[0] / row["denoise_p50_s"], "difference": _distance(latent, base[1])}
        self.keep(row)
        if gpus > 1:
            self.exchange(precision, gpus, size)

    def exchange(self, precision: str, gpus: int, size: int) -> None:
        """What working together costs in one evaluation, of ranks that have drawn this size together."""
        tokens = self.prompts[0][0][0].shape[1]
        seconds = self.cards.evaluation(gpus, size, tokens)
        row = {"what": "exchange", "precision": precision, "gpus": gpus, "size": size}
        row |= {"alone_s": seconds[1], "together_s": seconds[gpus], "beyond_ideal_s": seconds[gpus] - seconds[1] / gpus}
        self.keep(row | {"exchange_s": self.cards.exchange(gpus, size, tokens)})

    def recovery(self, precision: str, size: int) -> None:
        """From SIGKILL of a rank to a picture of each."""
        self.hold(precision)
        gpus = len(self.ranks)
        images = self.requests(gpus, size)
        before = self.cards.pictures(images, gpus)
        began = time.perf_counter()
        self.cards.kill()
        after = self.cards.pictures(images, gpus)
        seconds = time.perf_counter() - began
        row = {"what": "recovery", "precision": precision, "gpus": gpus, "size": size, "seconds": seconds}
        row |= {"gate": _same(before, after) == len(images)}
        self.keep(row | {"said": "from SIGKILL of a rank to the next picture of each"})

    def hold(self, precision: str) -> None:
        """Have the ranks hold the models in this precision."""
        if self.cards.key != precision:
            self.cards.load(precision)

    def evaluated(self, size: int, gpus: int) -> torch.Tensor:
        """The clean latent that one evaluation of noise predicts, by a replayed graph on a GPU."""
        given = self.requests(1, size), gpus, self.joined(gpus)
        return [self.cards.drawn(*given, steps=1) for _ in range(REPLAYED)][-1]

    def joined(self, gpus: int) -> str:
        """How so many draw one picture together, who have met."""
        if gpus > 1:
            self.cards.meet(gpus)
        return plan.SEQUENCE if gpus > 1 else plan.IMAGES

    def requests(self, count: int, size: int) -> list[dict]:
        return [image(number, (size, size), self.prompts[number]) for number in range(count)]


def _same(some: tuple[torch.Tensor, torch.Tensor], others: tuple[torch.Tensor, torch.Tensor]) -> int:
    """How many have the very same latent and picture."""
    pairs = zip(zip(*some, strict=True), zip(*others, strict=True), strict=True)
    return sum(one.equal(latent) and made.equal(picture) for (one, made), (latent, picture) in pairs)


def _distance(output: torch.Tensor, exact: torch.Tensor) -> float:
    """‖output - exact‖ / ‖exact‖."""
    return ((output.double() - exact.double()).norm() / exact.double().norm()).item()
