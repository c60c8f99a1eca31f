"""The text encoder as ranks run it, for nodes that run in this process: several new prompts spread evenly over ranks.

Each is encoded by itself, as one process does it. A rank reads the text encoder with the first prompt that it is given
and keeps it beside its models: of Qwen3-4B 7.6 GiB of its GPU as stored in bf16, 2.7 in INT4. Ranks that take others'
place read it with the next prompts, not before: what they were started for are pictures.
"""

import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management as management
import torch

from . import cache_file, spread, text
from .multi import LOAD_LIMIT, PICTURE_LIMIT, Spread

LEAST = 16  # new texts: each takes 5 ms on an H100, a request 2 to 3 ms, but reading the text encoder seconds, once
COMPUTED_IN = {"manual_cast_dtype"}  # the object patch of every CLIP, made by the host


@dataclass(frozen=True)
class Encodings:
    """An attachment of a CLIP of the loader and its clones.

    spread: that of the MODEL and the VAE. It is theirs: with them the ranks go, and prompts are encoded here. version:
    of the file when it was read here; ranks could only read another one.
    """

    spread: weakref.ref[Spread]
    text_encoder: Path
    version: str

    def __call__(self, clip, new: dict[Hashable, dict]) -> dict[Hashable, list[tuple[torch.Tensor, dict]]]:
        """What `text.unpadded` gives for each of the tokens; nothing where this process is to encode them.

        Raises as `Spread.group` and `Group.call` do.
        """
        given = self.spread()
        if given is None or len(new) < LEAST or not _as_loaded(clip) or not _has_room(clip, given):
            return {}
        if not self.text_encoder.exists() or cache_file.source_of(self.text_encoder) != self.version:
            return {}
        wanted = {"path": str(self.text_encoder), "version": self.version}
        request = {"key": given.key, "layer": clip.layer_idx, "text_encoder": wanted | {"precision": given.precision}}
        limit = LOAD_LIMIT + PICTURE_LIMIT * len(new)
        check = management.throw_exception_if_processing_interrupted
        encoded = spread.encode(given.group(), request, list(new.values()), limit, check)
        return {key: [_placed(*pair) for pair in pairs] for key, pairs in zip(new, encoded, strict=True)}


def attach(clip, given: Spread, text_encoder: Path) -> None:
    """Have several prompts for a CLIP of the loader encoded by ranks."""
    version = cache_file.source_of(text_encoder)
    clip.patcher.set_attachments(text.RANKS, Encodings(weakref.ref(given), text_encoder, version))


def _as_loaded(clip) -> bool:
    """Whether it is what a rank reads from the file: without LoRA, hooks and parts of other nodes."""
    patcher = clip.patcher
    parts = patcher.object_patches.keys() - COMPUTED_IN or patcher.injections
    hooks = patcher.forced_hooks or clip.apply_hooks_to_conds
    return not (patcher.patches or patcher.weight_wrapper_patches or parts or hooks)


def _has_room(clip, given: Spread) -> bool:
    """Whether it computes where ranks do, and stays there beside the diffusion model: else each rank would move both
    to and fro."""
    place = torch.device(given.setup.devices[0])
    return clip.patcher.load_device.type == place.type and not clip.patcher.is_dynamic()


def _placed(states: torch.Tensor, extra: dict) -> tuple[torch.Tensor, dict]:
    """Where the host wants conditioning."""
    device = management.intermediate_device()
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in extra.items()}
    return states.to(device), moved
