"""The attention backend that is fastest on this GPU: measured at first use, remembered on disk."""

import functools
import logging
import math
import os
from dataclasses import replace
from pathlib import Path

import folder_paths
import torch

from ..kernels.attention import ATTENTION, FP8, AttentionRequest, attention_of_codes, timing
from ..kernels.heads import quantise_heads
from ..kernels.registry import Backend, Choices

# A 1024x1024 picture with a short prompt. Smaller ones take what is best here: measured eagerly they would only show
# what a launch costs.
TOKENS = 64 * 65


@functools.cache
def attention_backend(
    name: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, allowed_error: float
) -> str:
    """The backend called `name`; with "auto" the fastest of those whose error is at most `allowed_error`.

    Raises ValueError, with each backend's reason, if it cannot run.
    """
    request = AttentionRequest(
        device=device, dtype=dtype, batch=1, heads=heads, tokens=TOKENS, keys=TOKENS, head_dim=head_dim
    )
    if name != "auto" or not measured_on(device):
        return ATTENTION.choose(name, request, allowed_error=allowed_error).name
    file, choices = choices_file(), read(choices_file())
    known, failed = dict(choices.names), []

    @functools.cache
    def tensors() -> list[torch.Tensor]:
        shape = (1, TOKENS, heads, head_dim)
        return [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]

    def measure(backend: Backend) -> float:
        try:
            q, k, v = tensors()
            if backend.name == FP8:  # the forward's norm before it puts out codes of q and k
                codes = quantise_heads(q), quantise_heads(k)
                backend = replace(backend, function=lambda q, k, v, lengths: attention_of_codes(*codes, v))
            seconds = timing(q, k, v)(backend)
        except Exception as error:  # of a package or GPU that we have not seen: the others can still be taken
            reason = str(error).partition("\n")[0]
            logging.warning("Z-Image-Turbo: attention by %s fails on %s: %s", backend.name, device, reason)
            failed.append(backend.name)
            return math.inf
        logging.info("Z-Image-Turbo: attention by %s takes %.2f ms on %s.", backend.name, seconds * 1000, device)
        return seconds

    chosen = ATTENTION.choose("auto", request, allowed_error=allowed_error, measure=measure, choices=choices).name
    if choices.names != known and not failed:  # what failed for want of memory may do better the next time
        write(file, choices)
    return chosen


def measured_on(device: torch.device) -> bool:
    """A processor takes the first backend: it has but one."""
    return device.type == "cuda"


def choices_file() -> Path:
    return Path(folder_paths.get_system_user_directory("zimage_turbo")) / "attention.json"


def read(file: Path) -> Choices:
    """What was measured before; nothing if there is no such file, or one that cannot be read."""
    if not file.exists():
        return Choices()
    try:
        return Choices.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        logging.warning("Z-Image-Turbo: %s cannot be read (%s); attention is measured again.", file, error)
        return Choices()


def write(file: Path, choices: Choices) -> None:
    """Whole or not at all, also beside another process that does the same."""
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(choices.to_json(), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        logging.warning("Z-Image-Turbo: %s cannot be written (%s); the next start measures again.", file, error)
