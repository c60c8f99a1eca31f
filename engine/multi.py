"""A MODEL and a VAE that the ranks of a group compute, one a GPU, while they stay what they are for every node.

They hold their weights in this process too, where ComfyUI patches, saves and clones them. A run of our sampler, and the
decoding of a batch, are spread over the ranks; other samplers run here, and ranks evaluate the denoiser for them. What
ranks cannot be told this process computes, and says so.
"""

import functools
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.model_sampling
import comfy.sd
import comfy.utils
import latent_preview
import torch
from comfy.cli_args import args
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from . import cache_file, conditioning, devices, ode, patches, plan, progress, prompt_batch, spread, topology
from .catalogue import Parts
from .evaluations import Evaluations
from .group import wire
from .group.coordinator import Group
from .group.current import current
from .group.launch import Hosts, Setup
from .refusal import common_refusal
from .sequence import size_class

ATTACHMENT = "zimage_multi_gpu"
MODEL, PATCHES, MEETING = "model", "patches", "meeting"  # what ranks that take others' place are told again
LOAD_LIMIT, PICTURE_LIMIT = 900.0, 600.0  # seconds
PIXELS = 8  # of a picture's side, for one of its latent
# Options of ComfyUI that say how and where models are computed; all others are the server's alone.
FLAGS = (
    "force_fp32", "force_fp16", "fp32_unet", "bf16_unet", "fp16_unet", "fp16_vae", "fp32_vae", "bf16_vae", "cpu_vae",
    "force_channels_last", "gpu_only", "highvram", "lowvram", "novram", "cpu", "disable_async_offload",
    "disable_dynamic_vram", "enable_dynamic_vram", "disable_smart_memory", "disable_pinned_memory", "deterministic",
    "fp16_intermediates",
)  # fmt: skip
VALUES = ("base_directory", "user_directory", "reserve_vram", "vram_headroom")
# What a prompt may come with that ranks are not told.
FOREIGN_PROMPTS = {"control": "a ControlNet is applied", "gligen": "GLIGEN is applied", "hooks": "a prompt has hooks"}
OnStep = Callable[[int, torch.Tensor, torch.Tensor, int], object]


def options() -> tuple[str, ...]:
    """Those of this process's own options that ranks are to follow."""
    flags = [f"--{name.replace('_', '-')}" for name in FLAGS if getattr(args, name)]
    values = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in VALUES if getattr(args, name)]
    return (*flags, *values)


@dataclass(frozen=True)
class Spread:
    """What ranks load, which ranks, and how they share work: an attachment of a MODEL and all its clones.

    split: of `plan.SPLITS`. seconds: of an evaluation by how many ranks compute it, by the class of a picture's size,
    with the size that was measured.
    """

    setup: Setup
    diffusion_model: Path
    vae: Path
    precision: str
    attention: str
    split: str
    seconds: dict[tuple[int, int], tuple[str, dict[int, float]]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, parts: Parts, precision: str, attention: str, num_gpus: int = 0, split: str = plan.AUTO) -> "Spread":
        """Of what the loader is given. Raises ValueError for more GPUs than there are, and as `Hosts.of`."""
        setup = Setup(devices.ranks(num_gpus), options(), hosts=Hosts.of(os.environ))
        return cls(setup, parts.diffusion_model, parts.vae, precision, attention, split)

    @property
    def key(self) -> str:
        """Under which ranks keep the models: another one for other models, or for files that have changed."""
        files = (self.diffusion_model, self.vae)
        return ";".join((self.precision, self.attention, *map(cache_file.source_of, files)))

    @property
    def remark(self) -> str | None:
        """What to tell of ranks that have no GPU."""
        if self.setup.devices[0] != devices.CPU:
            return None
        count = len(self.setup.devices)
        return f"multi-gpu finds no GPU that it can use: to try it out, ranks on the processor ({count})"

    def begin(self) -> None:
        """Have the ranks start while other nodes work."""
        current.begin(self.setup, self)

    def group(self) -> Group:
        """The group of this process, these models on its ranks. Raises GroupError, and ValueError as the loader."""
        group = current.group(self.setup, owner=self)
        if self.setup.devices[0] != devices.CPU and "topology" not in group.about:
            group.about["topology"] = topology.read().as_dict()
            logging.info("Z-Image-Turbo: multi-gpu: %s.", topology.read().described())
        wanted = {"diffusion_model": str(self.diffusion_model), "vae": str(self.vae), "key": self.key, "cache": False}
        wanted |= {"precision": self.precision, "attention": self.attention}
        if group.kept(MODEL) != wanted:
            group.drop(PATCHES)
            group.keep(MODEL, "load", wanted, LOAD_LIMIT, check=_interrupted)
        return group

    def choice(self, group: Group, latent: torch.Size, tokens: int) -> spread.Choose:
        """Which ranks draw which pictures of this size, [.., h, w]; those that are to draw together meet first."""
        islands = _islands(group, self.split == plan.SEQUENCE)
        largest = max(map(len, islands))
        # Others would leave GPUs without work; each takes time to meet and to measure, and memory for its graphs.
        sizes = [size for size in range(2, largest + 1) if largest % size == 0 and self.split != plan.IMAGES]
        if self.split == plan.SEQUENCE:
            sizes = sizes[-1:]
        elif self.setup.devices[0] == devices.CPU:  # whose cores one rank has as well as two
            sizes = ()
        for size in sizes:
            request = {"islands": islands, "size": size}
            if group.kept(f"{MEETING} {size}") != request:
                group.keep(f"{MEETING} {size}", "meet", request, LOAD_LIMIT, check=_interrupted)
        alike = size_class(1, latent[-2:].numel())
        if sizes and self.split == plan.AUTO and alike not in self.seconds:
            self.seconds[alike] = _size(latent), self._measured(group, [1, *sizes], islands, latent, tokens)
        _, seconds = self.seconds.get(alike, (None, None))
        if self.seconds:
            group.about["seconds_an_evaluation"] = {
                size: {str(ranks): round(own, 5) for ranks, own in found.items()}
                for size, found in self.seconds.values()
            }

        def choose(images: int, ranks: int) -> plan.Plan:
            left = [[number for number in island if number < ranks] for island in islands]
            split = self.split if sizes else plan.IMAGES
            chosen = plan.choose(images, [island for island in left if island], split, seconds)
            if group.about.get("choice", {}).get("reason") != chosen.reason:
                progress.tell(f"multi-gpu: {chosen.reason}")
            group.about["choice"] = chosen.as_dict() | {"size": _size(latent)}
            return chosen

        return choose

    def _measured(
        self, group: Group, sizes: list[int], islands: list[list[int]], latent: torch.Size, tokens: int
    ) -> dict[int, float]:
        """Seconds of the slowest rank."""
        progress.tell("multi-gpu: measuring by how many GPUs pictures of about this size are drawn fastest")
        request = {"key": self.key, "sizes": sizes, "islands": islands, "shape": [1, *latent[1:]], "tokens": tokens}
        told = group.call("measure", lambda ranks: dict.fromkeys(range(ranks), request), LOAD_LIMIT, check=_interrupted)
        found = {size: [own[str(size)] for own in told.values() if str(size) in own] for size in sizes}
        return {size: max(seconds) for size, seconds in found.items() if seconds}


def _islands(group: Group, asked: bool = False) -> list[list[int]]:
    """The numbers of ranks that fast links join: of this machine's GPUs by NVLink, of its processor all, and all of
    another machine, as what links them is not known here. asked: to have them draw together, also without NVLink."""
    machines: dict[str, dict[int, str]] = {}
    for number, (machine, device) in group.places(_interrupted).items():
        machines.setdefault(machine, {})[number] = device
    own = machines.pop(group.setup.address)
    others = [list(ranks) for ranks in machines.values()]
    if devices.CPU in own.values():
        return [list(own), *others]
    numbers = {int(device.removeprefix("cuda:")): number for number, device in own.items()}
    linked = [[numbers[index] for index in island if index in numbers] for island in topology.read().islands()]
    linked = [island for island in linked if island]
    if asked and max(map(len, linked), default=1) == 1:
        linked = [list(own)]
    return [*linked, *others]


def _size(latent: torch.Size) -> str:
    """Of the picture, '1024x768'."""
    return f"{latent[-1] * PIXELS}x{latent[-2] * PIXELS}"


def attach(model, vae: comfy.sd.VAE, given: Spread) -> None:
    """Have a MODEL and a VAE of the loader computed by ranks."""
    model.set_attachments(ATTACHMENT, given)
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, ATTACHMENT, evaluated_by_ranks)
    vae.__class__, vae.spread = SpreadVae, given


def spread_of(model) -> Spread | None:
    return model.get_attachment(ATTACHMENT)


def refusal(model, positive: list, solver: str) -> str | None:
    """Why ranks cannot compute a run of our sampler with this MODEL, CONDITIONING and solver, or None."""
    reason = model_refusal(model)
    if reason:
        return reason
    if model.model_options.keys() - {"transformer_options"}:
        return "another node changes how the model is computed"
    if not all(_same_flow(model, each) for each in model.object_patches.values()):
        return "another node replaced a part of the model"
    if solver not in ode.OWN:
        return f"the solver '{solver}' is another pack's"
    try:
        wire.pack([prompt_batch.split(positive)])
    except wire.Unsendable as error:
        return str(error)
    return None


def model_refusal(model) -> str | None:
    """Why ranks cannot evaluate the denoiser of this MODEL, or None. What is done to its results is no reason."""
    ours = {WrappersMP.PREPARE_SAMPLING: [conditioning.nearby, evaluated_by_ranks]}
    wrappers = {kind: list(itertools.chain(*own.values())) for kind, own in model.wrappers.items()}
    if {kind: own for kind, own in wrappers.items() if own} != ours:
        return "another node wraps the model"
    options = model.model_options
    if any(options.get("transformer_options", {}).values()) or "model_function_wrapper" in options:
        return "another node changes how the model is computed"
    if model.injections or model.hook_patches or model.additional_models:
        return "the model has a bypass LoRA, hooks or further models"
    if model.object_patches.keys() - {"model_sampling"}:
        return "another node replaced a part of the model"
    try:
        patches.as_tree(model)
    except ValueError as error:
        return str(error)
    return None


def _same_flow(model, patched) -> bool:
    """Whether noise levels mean the same: shifts only choose among them, and our sampler is given its own."""
    own = model.model.model_sampling
    return isinstance(patched, comfy.model_sampling.CONST) and patched.multiplier == own.multiplier


def evaluated_by_ranks(prepare, model, noise_shape, conds: dict[str, list[dict]], *arguments, **options):
    """A wrapper for the host's PREPARE_SAMPLING: a run in this process, whose denoiser ranks evaluate if they can.

    The host loads the weights here; that is left out where ranks can, until they cannot.
    """
    load = functools.partial(prepare, model, noise_shape, conds, *arguments, **options)
    reason = common_refusal(model.load_device) or model_refusal(model) or _prompts_refusal(conds)
    if reason:
        progress.tell(f"multi-gpu: this run is computed by one GPU alone, as {reason}")
        return load()
    given = spread_of(model)
    group = given.group()
    _have_patches(group, given.key, model)
    tokens = max(states.shape[1] for states in _texts(conds))
    choose = given.choice(group, noise_shape, tokens)
    # As loading does: another clone's parts, such as its noise schedule, may lie in what clones share.
    model.unpatch_model(unpatch_weights=False)
    model.patch_model(load_weights=False)
    run = Evaluations(group, given.key, model.model.diffusion_model, choose, _interrupted, load)
    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, ATTACHMENT, run, options["model_options"], is_model_options=True)
    return model.model, conds, []


def _prompts_refusal(conds: dict[str, list[dict]]) -> str | None:
    """Why ranks cannot be told the prompts of a run, or None. Further inputs of the model show at an evaluation."""
    for prompt in map(prompt_batch.unhooked, itertools.chain(*conds.values())):
        for name, reason in FOREIGN_PROMPTS.items():
            if prompt.get(name) is not None:
                return reason
    return None if _texts(conds) else "there is no text"


def _texts(conds: dict[str, list[dict]]) -> list[torch.Tensor]:
    states = (prompt.get("cross_attn") for prompt in itertools.chain(*conds.values()))
    return [each for each in states if each is not None]


def sample(
    model,
    positive: list,
    noise: torch.Tensor,
    start: torch.Tensor,
    mask: torch.Tensor | None,
    seed: int,
    levels: torch.Tensor,
    solver: str,
    tolerance: float,
    callback: OnStep,
) -> tuple[torch.Tensor, list[ode.Report]]:
    """What a guider's run gives, each picture as one GPU draws it by itself, with what each run did.

    noise, start [B, 16, h, w]; mask as LATENT has it. callback: the host's, of all pictures' steps together.
    """
    given = spread_of(model)
    group = given.group()
    _have_patches(group, given.key, model)
    prompts, count = prompt_batch.split(positive), len(start)
    masks, latents = _masks(mask, count), start.cpu().split(1) if start.any() else [None] * count
    pictures = [
        {
            "noise": noise[row : row + 1], "latent": latents[row], "mask": masks[row], "seed": seed,
            "positive": prompts[row % len(prompts)],
        }
        for row in range(count)
    ]  # fmt: skip
    steps, done = (len(levels) - 1) * count, iter(range((len(levels) - 1) * count))

    def on_step(picture: int, step: int, of: int, clean: torch.Tensor | None) -> None:
        callback(next(done, steps - 1), clean, clean, steps)

    previews = latent_preview.get_previewer(model.load_device, model.model.latent_format) is not None
    common = {"key": given.key, "sigmas": levels, "solver": solver, "tolerance": tolerance, "previews": previews}
    choose = given.choice(group, start.shape, prompts[0][0][0].shape[1])
    results = spread.draw(group, common, pictures, PICTURE_LIMIT * count, on_step, _interrupted, choose)
    return torch.cat([each["latent"] for each in results]), [ode.Report.of(each["report"]) for each in results]


def _masks(mask: torch.Tensor | None, count: int) -> Sequence[torch.Tensor | None]:
    if mask is None:
        return [None] * count
    rows = mask.reshape(-1, 1, *mask.shape[-2:])
    return comfy.utils.repeat_to_batch_size(rows, count).split(1)


def _have_patches(group: Group, key: str, model) -> None:
    """The MODEL's LoRA and other patches on every rank, and those of no other."""
    wanted = patches.as_tree(model)
    kept = group.kept(PATCHES)
    if kept is None and not wanted["patches"]:
        return
    if kept is None or kept["tree"]["uuid"] != wanted["uuid"]:
        group.keep(PATCHES, "patch", {"key": key, "tree": wanted}, LOAD_LIMIT, check=_interrupted)


def _interrupted() -> None:
    management.throw_exception_if_processing_interrupted()


class SpreadVae(comfy.sd.VAE):
    """A VAE whose batches are decoded by ranks, whole pictures on each."""

    spread: Spread

    def decode(self, samples_in: torch.Tensor, vae_options: dict[str, Any] = {}) -> torch.Tensor:
        if samples_in.ndim != 4 or len(samples_in) < 2 or vae_options or self.patcher.patches:
            return super().decode(samples_in, vae_options)
        scale, limit = self.spacial_compression_decode(), PICTURE_LIMIT * len(samples_in)
        height, width = (scale * side for side in samples_in.shape[2:])
        shape, dtype = torch.Size((len(samples_in), height, width, 3)), self.vae_output_dtype()
        latents = samples_in.float().cpu()
        group = self.spread.group()
        pictures = spread.decode(group, self.spread.key, latents, shape, dtype, limit, _interrupted)
        return pictures.to(self.output_device)
