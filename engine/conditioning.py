"""Prompts on their way to the model: states of text go to its device once a picture, not at every evaluation."""

import torch

from . import prompt_batch


def nearby(prepare, model, noise_shape, conds: dict[str, list[dict]], *arguments, **options):
    """A wrapper for the host's PREPARE_SAMPLING: what it returns, with the states where `model`, one of ours, computes.

    The host keeps them in main memory and would copy and cast them before every evaluation, which the GPU waits for.
    Prompts of several lengths come with a hook for other models, which is taken off.
    """
    base, conds, others = prepare(model, noise_shape, conds, *arguments, **options)
    moved = {kind: [_moved(prompt, model.load_device) for prompt in prompts] for kind, prompts in conds.items()}
    return base, moved, others


def _moved(prompt: dict, device: torch.device) -> dict:
    prompt = prompt_batch.unhooked(prompt)
    states = prompt.get("cross_attn")
    return prompt if states is None else prompt | {"cross_attn": states.to(device)}
