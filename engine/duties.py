"""What every rank can be asked to do: hold models, encode prompts, evaluate the denoiser, draw and decode pictures."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.samplers
import torch

from . import ode, patches, plan, prompt_batch, sampling, text
from .graphs import WARM_UP
from .group import wire
from .group.jobs import Cancelled, Job
from .group.worker import Rank
from .model import load_model
from .pace import Pace
from .together import Together
from .turbo import Joint
from .vae import load_vae

TIMED = 4  # evaluations


@dataclass
class Loaded:
    """A MODEL of the host, with the patches that it was last given, the VAE if there is one, and from the first prompts
    on the CLIP that they were for, with what was asked for."""

    model: Any
    vae: Any
    clip: tuple[dict, Any] | None = None

    def text_encoder(self, wanted: dict) -> Any:
        """The CLIP that `encode` is asked for, in place of another one."""
        if self.clip is None or self.clip[0] != wanted:
            self.clip = None
            _collect()
            path, precision = Path(wanted["path"]), wanted["precision"]
            self.clip = wanted, text.load_text_encoder(path, precision=precision, beside=self.model.model_size())
        return self.clip[1]

    @contextlib.contextmanager
    def joined(self, together: Together | None) -> Iterator[None]:
        """The denoiser is computed together with other ranks; None: by this one alone."""
        module = self.model.model.diffusion_model
        if together is not None:
            module.joint = module.joints.setdefault(together.members, Joint(together.ranks, together.least))
        try:
            yield
        finally:
            module.joint = None


def load(rank: Rank, job: Job) -> wire.Tree:
    """Load models by the loader's own arguments, kept under a key until `forget`, or until others are loaded.

    request: key; diffusion_model and vae, paths as strings, the latter or None; precision, attention; cache: whether
    one rank keeps a quantised form beside the file. Raises ValueError as the loader does.
    """
    given = job.request
    if given["key"] not in rank.models:
        _free(rank)
        # Ranks that write one file would spoil it for each other.
        cache = given["cache"] and rank.number == 0
        model = load_model(Path(given["diffusion_model"]), given["precision"], None, given["attention"], cache)
        vae = load_vae(Path(given["vae"])) if given["vae"] else None
        rank.models[given["key"]] = Loaded(model, vae)
    loaded = rank.models[given["key"]]
    management.load_models_gpu([loaded.model, *([loaded.vae.patcher] if loaded.vae else [])])
    if rank.number == 0:  # the others, which would measure at the same time and may choose otherwise, find its choice
        module, dtype = loaded.model.model.diffusion_model, loaded.model.model.get_dtype_inference()
        module.compute(torch.empty(0, device=loaded.model.load_device, dtype=dtype))
    return {"bytes": loaded.model.model_size()}


def forget(rank: Rank, job: Job) -> wire.Tree:
    """Give up what is kept under request['key'], if it is there."""
    if job.request["key"] in rank.models:
        _free(rank)
    return None


def _free(rank: Rank) -> None:
    rank.models.clear()
    _collect()


def _collect() -> None:
    """Free the memory of models that nobody has any more."""
    gc.collect()
    management.cleanup_models()
    management.soft_empty_cache()


def patch(rank: Rank, job: Job) -> wire.Tree:
    """Have the MODEL with these patches and no others. request: key; tree, as `patches.as_tree` gives it."""
    loaded = kept(rank, job.request["key"])
    loaded.model = patches.patched(loaded.model, job.request["tree"])
    return None


def encode(rank: Rank, job: Job) -> wire.Tree:
    """Prompts, one after the other, each told of as soon as it is there.

    request: key; text_encoder: path and precision, as the loader's, and version, of its file: it is read at the first
    request, and when these change; layer: as the host's CLIP has it; images, of each number and tokens as the host's
    CLIP.tokenize gives them. Tells {image, encoded: what `text.unpadded` gives}. Raises ValueError as the loader does.
    """
    clip = kept(rank, job.request["key"]).text_encoder(job.request["text_encoder"])
    clip.clip_layer(job.request["layer"])
    for image in job.request["images"]:
        job.check()
        job.tell({"image": image["number"], "encoded": text.unpadded(clip, image["tokens"])})
    return None


def evaluate(rank: Rank, job: Job) -> wire.Tree:
    """Some rows of one evaluation of the denoiser, as a batch: {first, result [B, 16, H, W] of x's type}.

    request: key; x [B, 16, H, W] and timesteps [B] of these rows, in the types that the host gives; prompt: the number
    of one that is kept, and first: which of its rows belongs to the first of these; ranks: as for `draw`, of which the
    first answers, the others None. It is one step, so it is not cancelled.
    """
    given = job.request
    loaded, together = kept(rank, given["key"]), _together(rank, given["ranks"])
    model, prompt = loaded.model, rank.prompts[given["prompt"]]
    x, timesteps = (given[name].to(rank.device) for name in ("x", "timesteps"))
    rows, arguments = slice(given["first"], given["first"] + len(x)), {}
    context, mask = prompt["context"][rows], prompt["attention_mask"]
    if prompt["lengths"]:
        lengths = tuple(prompt["lengths"][rows])
        context, arguments = context[:, : max(lengths)], {prompt_batch.LENGTHS: lengths}
    # By these the module knows captions that it has refined before: of other patches they are others.
    uuids = [prompt["name"], str(model.patches_uuid), rows.start, rows.stop]
    management.load_models_gpu([model], memory_required=model.model.memory_required(list(x.shape)))
    pace = Pace(rank.device, rank.limit if together else None)
    with loaded.joined(together):
        result = model.model.diffusion_model(
            x,
            timesteps,
            context,
            prompt["num_tokens"],
            None if mask is None else mask[rows],
            transformer_options={"uuids": uuids},
            **arguments,
        )
    pace.step()
    pace.wait()  # sending the result would wait for the GPU as well, without a limit
    return {"first": rows.start, "result": result} if together is None or together.leads else None


def prompt(rank: Rank, job: Job) -> wire.Tree:
    """Keep what of evaluations is the same at every step, in place of what was kept under the same number.

    request: number; name, of this prompt alone; as `NextDiT.forward` takes them: context [B, T, C] in the type that the
    model computes in, num_tokens, attention_mask, and lengths, of each row's prompt, or None.
    """
    given = job.request
    tensors = {name: value.to(rank.device) for name, value in given.items() if isinstance(value, torch.Tensor)}
    rank.prompts[given["number"]] = given | tensors
    return None


def meet(rank: Rank, job: Job) -> wire.Tree:
    """Let ranks of each island draw pictures together, so many a picture; asked of all ranks, once for each size.

    request: size, and islands, lists of ranks' numbers, of which there may be fewer now.
    """
    for members in teams(job.request["islands"], job.request["size"], rank.size):
        if members not in rank.together:
            rank.together[members] = Together(members, rank.number, rank.device, rank.limit)
    return None


def teams(islands: list[list[int]], size: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Ranks that draw a picture together, of as many ranks as there are."""
    return plan.groups_of([[number for number in island if number < ranks] for island in islands], size)


def measure(rank: Rank, job: Job) -> wire.Tree:
    """Seconds of one evaluation of the denoiser by how many ranks compute it, each number as a string.

    request: key; sizes of teams that have met, 1 for a rank alone; islands as for `meet`; shape of a latent, and tokens
    of a prompt. Asked of all ranks.
    """
    given, seconds = job.request, {}
    loaded = kept(rank, given["key"])
    module, dtype = loaded.model.model.diffusion_model, loaded.model.model.get_dtype_inference()
    device = loaded.model.load_device
    management.load_models_gpu([loaded.model])
    x = torch.randn(given["shape"], device=device, dtype=dtype)
    context = torch.randn(1, given["tokens"], module.cap_embedder[1].in_features, device=device, dtype=dtype)
    time_of = torch.full((1,), 0.5, device=device, dtype=dtype)

    def evaluate() -> None:
        module(x, time_of, context, given["tokens"], transformer_options={"uuids": ["measure"]})

    for size in given["sizes"]:
        own = [members for members in teams(given["islands"], size, rank.size) if rank.number in members]
        if own:
            with loaded.joined(_together(rank, own[0]) if size > 1 else None):
                seconds[str(size)] = _seconds(evaluate, device)
    return seconds


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    """Of one call, after those that compile and capture."""
    for _ in range(WARM_UP + 1):
        function()
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    began = time.perf_counter()
    for _ in range(TIMED):
        function()
    synchronise()
    return (time.perf_counter() - began) / TIMED


def draw(rank: Rank, job: Job) -> wire.Tree:
    """Whole runs of the sampler, one picture after the other, each told of as soon as it is there.

    request: key; images, of each number, noise and latent [1, 16, h, w] as the guider takes them (latent None: zeros),
    mask (or None), seed and positive, a CONDITIONING; sigmas [steps + 1], solver, tolerance; previews: whether clean
    latents are told of at each step; ranks: the numbers of those that are asked the same, and compute it together, or
    None. Tells {image, step, steps, preview}, and of each result {image, latent [1, 16, h, w], report}; of several
    ranks the first does. Cancelled between steps, by all of them at once.
    """
    loaded, together = kept(rank, job.request["key"]), _together(rank, job.request["ranks"])
    with loaded.joined(together):
        for image in job.request["images"]:
            pace = Pace(rank.device, rank.limit if together else None)
            latent, report = _drawn(loaded.model, image, job, together, pace)
            if together is None or together.leads:
                job.tell({"image": image["number"], "latent": latent, "report": report.as_dict()})
    return None


def _together(rank: Rank, numbers: list[int] | None) -> Together | None:
    if numbers is None:
        return None
    if tuple(numbers) not in rank.together:
        raise ValueError(f"ranks {numbers} were not asked to meet, but: {list(rank.together) or 'none'}.")
    return rank.together[tuple(numbers)]


def _drawn(model, image: dict, job: Job, together: Together | None, pace: Pace) -> tuple[torch.Tensor, Any]:
    given = job.request

    def check() -> None:
        if together is None:
            job.check()
        elif together.any(job.cancelled):  # one that stopped by itself would be waited for by the others
            raise Cancelled

    def on_step(step: int, clean: torch.Tensor, x: torch.Tensor, steps: int) -> None:
        pace.step()
        if given["previews"] or given["solver"] != ode.OFFICIAL or step + 1 == steps:
            pace.wait()  # what follows waits for the GPU, and knows no limit
        check()
        if together is None or together.leads:
            preview = clean if given["previews"] else None
            job.tell({"image": image["number"], "step": step + 1, "steps": steps, "preview": preview})

    check()
    latent = torch.zeros_like(image["noise"]) if image["latent"] is None else image["latent"]
    reports = []
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": image["positive"]})
    guider.set_cfg(1.0)
    latent = guider.sample(
        image["noise"],
        latent.to(model.load_device),
        sampling.sampler(given["solver"], given["tolerance"], reports.append),
        given["sigmas"],
        denoise_mask=image["mask"],
        callback=on_step,
        disable_pbar=True,
        seed=image["seed"],
    )
    return latent.to(management.intermediate_device()), reports[-1]


def decode(rank: Rank, job: Job) -> wire.Tree:
    """Pictures of latents, one after the other, each told of as soon as it is there.

    request: key; images, of each number, latent [1, 16, h, w], and into, shared memory for the picture, or None. Tells
    {image, picture [1, H, W, 3], or None where it is in shared memory}.
    """
    vae = kept(rank, job.request["key"]).vae
    for image in job.request["images"]:
        job.check()
        picture = vae.decode(image["latent"])
        if image["into"] is not None:
            image["into"].copy_(picture)
            picture = None
        job.tell({"image": image["number"], "picture": picture})
    return None


def kept(rank: Rank, key: str) -> Loaded:
    """Raises ValueError for a key that nothing was loaded under."""
    if key not in rank.models:
        raise ValueError(f"rank {rank.number} holds no model '{key}', but: {', '.join(rank.models) or 'none'}.")
    return rank.models[key]


DUTIES = (load, forget, patch, meet, measure, encode, prompt, evaluate, draw, decode)
OPERATIONS = {each.__name__: each for each in DUTIES}
