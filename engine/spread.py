"""Pictures spread over the ranks of a group: whole ones, in order, each as one GPU draws it for its noise, and their
prompts before; or the rows of one evaluation of the denoiser."""

import contextlib
from collections.abc import Callable, Sequence

import torch

from . import plan
from .group import shared, wire
from .group.coordinator import Group
from .group.shared import Shared

OnStep = Callable[[int, int, int, torch.Tensor | None], object]
Choose = Callable[[int, int], plan.Plan]


def whole(images: int, ranks: int) -> plan.Plan:
    """Each image by one rank."""
    return plan.choose(images, [range(ranks)], plan.IMAGES)


def draw(
    group: Group,
    common: dict[str, wire.Tree],
    images: Sequence[dict[str, wire.Tree]],
    limit_s: float,
    on_step: OnStep = lambda image, step, steps, preview: None,
    check: Callable[[], object] | None = None,
    choose: Choose = whole,
) -> list[dict[str, wire.Tree]]:
    """What `duties.draw` tells of each image, in the order of `images`.

    common and images: its request, images without their numbers. on_step(image, step, steps, preview) as steps are
    done, by whichever rank; what it or check() raises stops all. limit_s: seconds for all images.
    choose(images, ranks): which ranks draw which; those that draw together must have met. Images that are there when a
    rank fails are kept, and the others are drawn by the ranks that take its place. Raises as `Group.call` does.
    """

    def on_told(told: dict) -> bool:
        if "step" in told:
            on_step(told["image"], told["step"], told["steps"], told["preview"])
        return "step" not in told

    return _spread(group, "draw", common, images, limit_s, on_told, check, choose)


def encode(
    group: Group,
    common: dict[str, wire.Tree],
    prompts: Sequence[dict[str, wire.Tree]],
    limit_s: float,
    check: Callable[[], object] | None = None,
) -> list[wire.Tree]:
    """What `duties.encode` tells of the tokens of each prompt. common: the rest of its request. Otherwise as `draw`."""
    images = [{"tokens": tokens} for tokens in prompts]
    results = _spread(group, "encode", common, images, limit_s, lambda told: True, check, whole)
    return [told["encoded"] for told in results]


def evaluate(
    group: Group,
    common: dict[str, wire.Tree],
    x: torch.Tensor,
    timesteps: torch.Tensor,
    limit_s: float,
    check: Callable[[], object] | None = None,
    choose: Choose = whole,
) -> torch.Tensor:
    """What `duties.evaluate` gives for all rows of x [B, 16, h, w], in order; in main memory, as are x and timesteps.

    common: the rest of its request. choose(rows, ranks): which ranks evaluate which. Raises as `Group.call` does.
    """

    def requests(size: int) -> dict[int, wire.Tree]:
        shares, asked = choose(len(x), size), {}
        for members, places in zip(shares.groups, shares.images, strict=True):
            rows = slice(places[0], places[-1] + 1)
            request = common | {"x": x[rows], "timesteps": timesteps[rows], "first": rows.start}
            asked |= dict.fromkeys(members, request | {"ranks": list(members) if len(members) > 1 else None})
        return asked

    answers = group.call("evaluate", requests, limit_s, check=check).values()
    parts = sorted((told for told in answers if told is not None), key=lambda told: told["first"])
    return torch.cat([told["result"] for told in parts])


def decode(
    group: Group,
    key: str,
    latents: torch.Tensor,
    pictures: torch.Size,
    dtype: torch.dtype,
    limit_s: float,
    check: Callable[[], object] | None = None,
    choose: Choose = whole,
) -> torch.Tensor:
    """The pictures [B, H, W, 3], whose shape and type are given, of latents [B, 16, h, w]. Otherwise as `draw`.

    Ranks put them where they are wanted, if they can open memory of this process: to send a picture of 1024x1024 takes
    about as long as to decode it.
    """
    with contextlib.ExitStack() as stack:
        room = stack.enter_context(contextlib.closing(Shared(pictures, dtype))) if shared.possible() else None
        images = [{"latent": each, "into": room and room.row(row)} for row, each in enumerate(latents.split(1))]
        results = _spread(group, "decode", {"key": key}, images, limit_s, lambda told: True, check, choose)
    made = room.tensor if room else torch.empty(pictures, dtype=dtype)
    for row, told in enumerate(results):
        if told["picture"] is not None:
            made[row] = told["picture"][0]
    return made


def _spread(
    group: Group,
    operation: str,
    common: dict[str, wire.Tree],
    images: Sequence[dict[str, wire.Tree]],
    limit_s: float,
    is_result: Callable[[dict], bool],
    check: Callable[[], object] | None,
    choose: Choose,
) -> list[dict[str, wire.Tree]]:
    """What is told of each image that is_result(told), which sees all that is told."""
    results: dict[int, dict] = {}

    def requests(size: int) -> dict[int, wire.Tree]:
        left = [number for number in range(len(images)) if number not in results]
        if not left:
            return {}
        shares, asked = choose(len(left), size), {}
        for members, places in zip(shares.groups, shares.images, strict=True):
            own = [images[left[place]] | {"number": left[place]} for place in places]
            request = common | {"images": own, "ranks": list(members) if len(members) > 1 else None}
            asked |= dict.fromkeys(members, request)
        return asked

    def on_progress(rank: int, told: dict) -> None:
        if is_result(told):
            results[told["image"]] = told

    group.call(operation, requests, limit_s, on_progress, check)
    return [results[number] for number in range(len(images))]
