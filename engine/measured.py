"""What is fastest here, measured at first use: the attention backend of this GPU, and how ranks exchange.

The backend is remembered on disk. The form of an exchange depends on what links the ranks: each start measures it.
"""

import functools
import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import folder_paths
import torch
from comfy.ldm.lumina.model import NextDiT

from ..kernels.attention import ATTENTION, timing
from ..kernels.registry import Backend, Choices
from . import forward
from .graphs import CAPTURING
from .rehearsal import rehearse
from .sequence import FORMS, Form, size_class
from .trial import Trial, compiled, compiling


@functools.cache
def attention_backend(
    name: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, allowed_error: float
) -> str:
    """The backend called `name`; with "auto" the fastest of those whose error is at most `allowed_error`.

    Raises ValueError, with each backend's reason, if it cannot run.
    """
    trial = Trial(device, dtype, heads, head_dim)
    if name != "auto" or not measured_on(device):
        return ATTENTION.choose(name, trial.request, allowed_error=allowed_error).name
    file, choices = choices_file(), read(choices_file())
    known, short = dict(choices.names), []

    def measure(backend: Backend) -> float:
        try:
            compiled(device, dtype, heads, head_dim, allowed_error)
            seconds = timing(*trial.tensors)(replace(backend, function=trial.function(backend)))
        except Exception as error:  # of a package or GPU that we have not seen: the others can still be taken
            reason = str(error).partition("\n")[0]
            logging.warning("Z-Image-Turbo: attention by %s fails on %s: %s", backend.name, device, reason)
            if isinstance(error, torch.OutOfMemoryError):
                short.append(backend.name)
            return math.inf
        logging.info("Z-Image-Turbo: attention by %s takes %.2f ms on %s.", backend.name, seconds * 1000, device)
        return seconds

    chosen = ATTENTION.choose("auto", trial.request, allowed_error=allowed_error, measure=measure, choices=choices).name
    if choices.names != known and not short:  # what failed for want of memory may do better the next time
        write(file, choices)
    return chosen


def foresee_attention(
    name: str, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, allowed_error: float
) -> None:
    """Begin to compile what `attention_backend` will measure with these, if it will."""
    if name != "auto" or not measured_on(device):
        return
    unknown = []

    def asked(backend: Backend) -> float:
        unknown.append(backend)
        return 0.0

    request, choices = Trial(device, dtype, heads, head_dim).request, read(choices_file())
    ATTENTION.choose("auto", request, allowed_error=allowed_error, measure=asked, choices=choices)
    if unknown:
        compiling(device, dtype, heads, head_dim, allowed_error)


def settle_form(
    module: NextDiT,
    compute: forward.Compute,
    batch: int,
    words: int,
    table: torch.Tensor,
    least: Callable[[int], int],
) -> None:
    """Choose how `compute.ranks` exchange sequences of this size: as one block's attention is fastest.

    table: as `forward.denoise` takes it, of `words` caption tokens and the picture's; least: as `Together.least`. All
    ranks call it before they first evaluate a size, outside of a capture, and come to the same choice: a form is as
    fast as its slowest rank. Sizes of a known order return at once, and so does everything on a processor.
    """
    ranks, key = compute.ranks, size_class(batch, len(table))
    if ranks.form or key in ranks.forms or not measured_on(table.device):
        return
    block, share = module.layers[0], ranks.share(batch, words, len(table) - words)
    angles, _ = share.angles(table, words)
    x = torch.randn(batch, len(angles), module.dim, device=table.device, dtype=compute.residual)
    y = forward.begin(x, block.attention_norm1, None, block.attention.qkv, compute.dtype)

    def attend(form: Form) -> object:
        exchange = replace(share.joint, form=form)
        return forward.attend(block.attention, y, angles, compute, exchange)

    with torch.cuda.device_of(table):
        rehearse(lambda: list(map(attend, FORMS)), (), table.device)
        slowest = ranks.slowest([replay_seconds(functools.partial(attend, form), least) for form in FORMS])
    ranks.forms[key] = FORMS[slowest.index(min(slowest))]
    found = ", ".join(f"{form} {1e6 * time:.0f} µs" for form, time in zip(FORMS, slowest, strict=True))
    logging.info("Z-Image-Turbo: attention of %s tokens by %s ranks: %s.", len(table), ranks.size, found)


def replay_seconds(run: Callable[[], object], least: Callable[[int], int], calls: int = 8, rounds: int = 5) -> float:
    """GPU seconds of a call without what its launches cost the host: of so many calls in one CUDA graph, the best.

    Infinity where ranks cannot capture it, one of them or all. least: the least number that any of them gives.
    """
    run()  # connects ranks
    graph, stream, captured = torch.cuda.CUDAGraph(), torch.cuda.Stream(), True
    try:
        with CAPTURING, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(calls):
                run()
    except RuntimeError as error:
        logging.warning("Z-Image-Turbo: no CUDA graph of an exchange: %s", str(error).partition("\n")[0])
        captured = False
    if not least(captured):
        return math.inf
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times) / calls / 1000


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
