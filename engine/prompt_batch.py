"""Several prompts as the rows of one CONDITIONING, each as long as its own text.

Its states are [prompts, longest, width], with zeros behind the end of each prompt. Zeros are not padding that the model
knows: its own is a learned token behind its caption embedder, which attends to whatever it is given. So the lengths go
with the states, as an argument of the diffusion model's forward: ours pads each row as if it were alone. To the host's
model, which would ignore them, a hook of the conditioning gives rows of one length at a time.
"""

import math
from collections.abc import Callable, Sequence

import torch
from comfy.conds import CONDConstant
from comfy.hooks import EnumHookScope, HookGroup, TransformerOptionsHook
from comfy.patcher_extension import WrappersMP

from . import rows

LENGTHS = "prompt_lengths"  # the argument: tokens of each row of the batch, a tuple
KEY = "zimage_turbo"  # of our wrapper among those of others


class PromptLengths(CONDConstant):
    """cond: tokens of each prompt. The host repeats rows of states up to the batch, and asks this to do the same."""

    def process_cond(self, batch_size: int, **kwargs) -> "PromptLengths":
        """Raises ValueError for a batch that leaves prompts out."""
        prompts = len(self.cond)
        if batch_size % prompts:
            raise ValueError(
                f"The conditioning holds {prompts} prompts, but the latent batch is {batch_size}: set the batch_size "
                f"of the empty latent to {prompts} or a multiple. Z-Image-Turbo Sampler does so without a latent_image."
            )
        return PromptLengths(self.cond * (batch_size // prompts))

    def can_concat(self, other: CONDConstant) -> bool:
        """Never with other conditionings: rows that are regrouped could not be told from theirs."""
        return False


def each_length(
    execute: Callable[..., torch.Tensor], x, timesteps, context, num_tokens, attention_mask=None, **arguments
) -> torch.Tensor:
    """A wrapper for the host's DIFFUSION_MODEL: `execute`, the forward of a NextDiT, with rows of one length at a time.

    Raises ValueError for states that are not those of the lengths.
    """
    lengths = arguments.pop(LENGTHS, None)
    if lengths is None:
        return execute(x, timesteps, context, num_tokens, attention_mask, **arguments)
    check(lengths, context)
    groups, parts = rows.alike(lengths), []
    for numbers in groups:
        length = lengths[numbers[0]]
        own = {name: _of_rows(value, numbers, len(x)) for name, value in arguments.items()}
        given = (rows.take(tensor, numbers) for tensor in (x, timesteps, context[:, :length]))
        parts.append(execute(*given, length, None, **own))
    return rows.restored(parts, groups)


def _of_rows(value, numbers: rows.Numbers, count: int):
    """What of an argument of the host's forward belongs to these rows of so many."""
    if isinstance(value, list):
        return [_of_rows(each, numbers, count) for each in value]
    return rows.take(value, numbers) if isinstance(value, torch.Tensor) and len(value) == count else value


def check(lengths: Sequence[int], context: torch.Tensor) -> None:
    """Raises ValueError if context [B, T, C] is not that of rows of these lengths."""
    if (len(lengths), max(lengths)) != context.shape[:2]:
        raise ValueError(
            f"A conditioning of {len(lengths)} prompts of up to {max(lengths)} tokens reached the model as "
            f"{list(context.shape)}: another node joined or cut its states. Give that node one prompt at a time, "
            "with one_per_line off."
        )


class RowWise(TransformerOptionsHook):
    """Brings `each_length` to a model of the host. Clones are made by the host, which gives no arguments."""

    def __init__(self):
        wrappers = {WrappersMP.DIFFUSION_MODEL: {KEY: [each_length]}}
        super().__init__({"wrappers": wrappers}, EnumHookScope.HookedOnly)


def gathered(conditionings: Sequence[list]) -> list:
    """One CONDITIONING of several, each of one prompt without padding and of as many entries as the others."""
    if len(conditionings) == 1:
        return conditionings[0]
    return [_stacked(entries) for entries in zip(*conditionings, strict=True)]


def _stacked(entries: Sequence[list]) -> list:
    lengths = tuple(states.shape[1] for states, _ in entries)
    longest, pad = max(lengths), torch.nn.functional.pad
    extra = dict(entries[0][1])
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    extra |= {"attention_mask": mask.long(), "model_conds": {LENGTHS: PromptLengths(lengths)}}
    if min(lengths) < longest:
        hooks = HookGroup()
        hooks.add(RowWise())
        extra["hooks"] = hooks.clone_and_combine(extra.get("hooks"))
    return [torch.cat([pad(states, (0, 0, 0, longest - states.shape[1])) for states, _ in entries]), extra]


def lengths_of(extra: dict) -> tuple[int, ...] | None:
    """Tokens of each prompt of an entry; None if it is of one prompt."""
    lengths = extra.get("model_conds", {}).get(LENGTHS)
    return None if lengths is None else lengths.cond


def count(conditioning: list) -> int:
    """How many prompts it holds: the smallest batch in which each of its entries has all its rows."""
    return math.lcm(*(len(lengths_of(extra) or (1,)) for _, extra in conditioning))


def split(conditioning: list) -> list[list]:
    """A CONDITIONING for each prompt, without padding: those that `gathered` was given."""
    return [[_row(*entry, number) for entry in conditioning] for number in range(count(conditioning))]


def _row(states: torch.Tensor, extra: dict, number: int) -> list:
    lengths = lengths_of(extra)
    if lengths is None:
        return [states, extra]
    number %= len(lengths)
    own = unhooked(extra) | {"attention_mask": extra["attention_mask"][number : number + 1, : lengths[number]]}
    own["model_conds"] = {name: value for name, value in extra["model_conds"].items() if name != LENGTHS}
    return [states[number : number + 1, : lengths[number]], own]


def repeated(conditioning: list, times: int) -> list:
    """With each prompt so many times, one behind the other; what is one prompt stays, for the host repeats it."""
    order = [number for number in range(count(conditioning)) for _ in range(times)]
    return [_ordered(*entry, order) for entry in conditioning]


def _ordered(states: torch.Tensor, extra: dict, order: Sequence[int]) -> list:
    lengths = lengths_of(extra)
    if lengths is None:
        return [states, extra]
    order = [number % len(lengths) for number in order]
    own = {"attention_mask": rows.take(extra["attention_mask"], order)}
    own["model_conds"] = extra["model_conds"] | {LENGTHS: PromptLengths(tuple(lengths[number] for number in order))}
    return [rows.take(states, order), extra | own]


def unhooked(extra: dict) -> dict:
    """An entry's values, or a prompt of the host, without the hook that our own model has no need of.

    With any hook the host runs a model without dynamic VRAM, and our forward refines captions at every evaluation.
    """
    hooks = extra.get("hooks")
    if hooks is None or not any(isinstance(hook, RowWise) for hook in hooks.hooks):
        return extra
    others = HookGroup()
    for hook in hooks.hooks:
        if not isinstance(hook, RowWise):
            others.add(hook)
    rest = {name: value for name, value in extra.items() if name != "hooks"}
    return rest | {"hooks": others} if len(others) else rest
