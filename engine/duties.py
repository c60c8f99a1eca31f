"""What every rank can be asked to do: hold models, evaluate the denoiser once, draw and decode whole pictures."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.samplers
import torch

from . import patches, sampling
from .group import wire
from .group.jobs import Job
from .group.worker import Rank
from .model import load_model
from .vae import load_vae


@dataclass
class Loaded:
    """A MODEL of the host, with the patches that it was last given, and the VAE if there is one."""

    model: Any
    vae: Any


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
    return {"bytes": loaded.model.model_size()}


def forget(rank: Rank, job: Job) -> wire.Tree:
    """Give up what is kept under request['key'], if it is there."""
    if job.request["key"] in rank.models:
        _free(rank)
    return None


def _free(rank: Rank) -> None:
    rank.models.clear()
    gc.collect()
    management.cleanup_models()
    management.soft_empty_cache()


def patch(rank: Rank, job: Job) -> wire.Tree:
    """Have the MODEL with these patches and no others. request: key; tree, as `patches.as_tree` gives it."""
    loaded = kept(rank, job.request["key"])
    loaded.model = patches.patched(loaded.model, job.request["tree"])
    return None


def evaluate(rank: Rank, job: Job) -> wire.Tree:
    """One evaluation of the denoiser: what `NextDiT.forward` returns, [B, 16, H, W] of x's type.

    request: key; x [B, 16, H, W], timesteps [B], context [B, T, C] in the type that the model computes in; num_tokens,
    attention_mask, options (the host's transformer_options), arguments (the rest by name).
    """
    given = job.request
    model = kept(rank, given["key"]).model
    management.load_models_gpu([model])
    tensors = (given[name].to(model.load_device) for name in ("x", "timesteps", "context"))
    return model.model.diffusion_model(
        *tensors,
        given["num_tokens"],
        given["attention_mask"],
        transformer_options=given["options"],
        **given["arguments"],
    )


def draw(rank: Rank, job: Job) -> wire.Tree:
    """Whole runs of the sampler, one picture after the other, each told of as soon as it is there.

    request: key; images, of each number, noise and latent [1, 16, h, w] as the guider takes them, mask (or None), seed
    and positive, a CONDITIONING; sigmas [steps + 1], solver, tolerance; decode: whether pictures are wanted; previews:
    whether clean latents are told of at each step. Tells {image, step, steps, preview}, and of each result {image,
    latent [1, 16, h, w], picture [1, H, W, 3] or None, report}. Cancelled between steps.
    """
    loaded = kept(rank, job.request["key"])
    if job.request["decode"] and loaded.vae is None:
        raise ValueError(f"pictures are wanted, but '{job.request['key']}' was loaded without a VAE.")
    for image in job.request["images"]:
        latent, report = _drawn(loaded.model, image, job)
        picture = loaded.vae.decode(latent) if job.request["decode"] else None
        job.check()
        about = report.as_dict()
        job.tell({"image": image["number"], "latent": latent, "picture": picture, "report": about})
    return None


def _drawn(model, image: dict, job: Job) -> tuple[torch.Tensor, Any]:
    given = job.request

    def on_step(step: int, clean: torch.Tensor, x: torch.Tensor, steps: int) -> None:
        job.check()
        preview = clean if given["previews"] else None
        job.tell({"image": image["number"], "step": step + 1, "steps": steps, "preview": preview})

    reports = []
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": image["positive"]})
    guider.set_cfg(1.0)
    latent = guider.sample(
        image["noise"],
        image["latent"].to(model.load_device),
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

    request: key; images, of each number and latent [1, 16, h, w]. Tells {image, picture [1, H, W, 3]}.
    """
    vae = kept(rank, job.request["key"]).vae
    for image in job.request["images"]:
        job.check()
        job.tell({"image": image["number"], "picture": vae.decode(image["latent"])})
    return None


def kept(rank: Rank, key: str) -> Loaded:
    """Raises ValueError for a key that nothing was loaded under."""
    if key not in rank.models:
        raise ValueError(f"rank {rank.number} holds no model '{key}', but: {', '.join(rank.models) or 'none'}.")
    return rank.models[key]


OPERATIONS = {"load": load, "forget": forget, "patch": patch, "evaluate": evaluate, "draw": draw, "decode": decode}
