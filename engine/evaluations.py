"""The denoiser as ranks evaluate it, for samplers that run in this process: a request to them at every evaluation."""

import functools
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from comfy.patcher_extension import WrapperExecutor

from . import forward, progress, prompt_batch, spread
from .group.coordinator import Group
from .turbo import MAX_CAPTIONS

LIMIT = 600.0  # seconds, of a row
PROMPTS = MAX_CAPTIONS  # that ranks keep: as many as their modules keep refined


class Evaluations:
    """A wrapper for the host's DIFFUSION_MODEL, in the one run of a sampler that it is made for.

    key: of the models on the ranks, which have the patches of this run. module: the one that is evaluated. choose and
    check: as for `spread.evaluate`. load: has the weights here; called once, if an evaluation has to be computed here.
    """

    def __init__(
        self,
        group: Group,
        key: str,
        module: torch.nn.Module,
        choose: spread.Choose,
        check: Callable[[], object],
        load: Callable[[], object],
    ):
        self.group, self.key, self.module, self.check = group, key, module, check
        self.choose = functools.cache(choose)  # which says its reason
        self.load: Callable[[], object] | None = load
        self.prompts = deque(range(PROMPTS))  # the least recently used first

    def __call__(
        self,
        execute: WrapperExecutor,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None,
        num_tokens: int,
        attention_mask: torch.Tensor | None = None,
        transformer_options: dict[str, Any] = {},
        **arguments,
    ) -> torch.Tensor:
        """What `execute`, the forward of the module, returns, on x's device."""
        given = x, timesteps, context, num_tokens, attention_mask
        if execute.class_obj is not self.module:  # a guider's second model, which is asked with the first one's options
            return execute(*given, transformer_options=transformer_options, **arguments)
        reason = forward.request_refusal(context, transformer_options, arguments)
        if reason:
            self._have_weights(reason)
            return execute(*given, transformer_options=transformer_options, **arguments)
        # First of all, as this waits for what this thread's stream computes: another thread packs the context.
        inputs = x.cpu(), timesteps.cpu()
        prompt = {"context": context, "num_tokens": num_tokens, "attention_mask": attention_mask}
        number = self._known(prompt | {"lengths": arguments.get(prompt_batch.LENGTHS)})
        request = {"key": self.key, "prompt": number}
        return spread.evaluate(self.group, request, *inputs, LIMIT * len(x), self.check, self.choose).to(x.device)

    def _have_weights(self, reason: str) -> None:
        if self.load is not None:
            progress.tell(f"multi-gpu: evaluations are computed by one GPU alone, as {reason}")
            self.load()
            self.load = None

    def _known(self, prompt: dict[str, Any]) -> int:
        """The number under which ranks keep a prompt; they are told of it unless they have it.

        The group itself remembers what they were told, also for ranks that are started anew.
        """
        for number in reversed(self.prompts):
            if _same(self.group.kept(_kept_as(number)), prompt):
                break
        else:
            number = self.prompts[0]
            request = prompt | {"number": number, "name": uuid.uuid4().hex}
            self.group.keep(_kept_as(number), "prompt", request, LIMIT, check=self.check)
        self.prompts.remove(number)
        self.prompts.append(number)
        return number


def _kept_as(number: int) -> str:
    return f"prompt {number}"


def _same(kept: dict[str, Any] | None, prompt: dict[str, Any]) -> bool:
    return kept is not None and all(_equal(kept[name], value) for name, value in prompt.items())


def _equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return type(one) is type(other) and one == other
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and torch.equal(one, other)
