"""Running the sampler on a MODEL of the host: noise, guidance off, progress, previews, interruption."""

import logging
from collections.abc import Callable

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from . import multi, ode, progress, prompt_batch
from .model import LATENT_SCALE, NATIVE_SIZE
from .turbo import TurboNextDiT

SIZE_STEP = 16
FULL_SIZE = 1024  # that official models were trained at


def sampler(
    solver: str, tolerance: float, on_report: Callable[[ode.Report], object] = lambda report: None
) -> comfy.samplers.KSAMPLER:
    """A solver of `ode` as a SAMPLER that SamplerCustomAdvanced takes.

    What it did is given to on_report, and stands as text on the node that runs it.
    """

    def run(model, x, sigmas, extra_args=None, callback=None, disable=None):
        extra_args = extra_args or {}

        def on_evaluation(number, clean, current, sigma):
            comfy.model_management.throw_exception_if_processing_interrupted()
            if callback is not None:
                callback({"x": current, "i": number, "sigma": sigma, "sigma_hat": sigma, "denoised": clean})

        x, report = ode.solve(
            solver, lambda current, sigma: model(current, sigma, **extra_args), x, sigmas, tolerance, on_evaluation
        )
        progress.show(str(report))
        on_report(report)
        return x

    return comfy.samplers.KSAMPLER(run)


def size_remark(model, latent: dict) -> str | None:
    """What to tell of a picture far from the sizes that a small model, as the demo is one, was trained on."""
    native = model.get_attachment(NATIVE_SIZE) or FULL_SIZE
    height, width = (side * LATENT_SCALE for side in latent["samples"].shape[-2:])
    least, most = native * 3 // 4, native * 3 // 2
    if native >= FULL_SIZE or least <= min(height, width) <= max(height, width) <= most:
        return None
    return (
        f"This model was trained on pictures of {least} to {most} pixels a side. At {width} × {height} it draws little "
        "of what the prompt says."
    )


def empty_latent(model, width: int, height: int, batch_size: int) -> dict:
    """Zeros [batch, 16, height / 8, width / 8]; a side of 0 is the size that the model was trained at.

    Raises ValueError for a side that is not a multiple of 16 pixels.
    """
    native = model.get_attachment(NATIVE_SIZE) or FULL_SIZE
    sides = {"width": width or native, "height": height or native}
    for name, side in sides.items():
        if side % SIZE_STEP:
            below = max(SIZE_STEP, side // SIZE_STEP * SIZE_STEP)
            raise ValueError(
                f"{name} is {side}, but sides are multiples of {SIZE_STEP} pixels. Use {below} or {below + SIZE_STEP}."
            )
    shape = (batch_size, 16, sides["height"] // LATENT_SCALE, sides["width"] // LATENT_SCALE)
    return {"samples": torch.zeros(shape, device=model.load_device)}


def starting_point(
    model, positive: list, width: int, height: int, batch_size: int, latent_image: dict | None = None
) -> tuple[list, dict]:
    """positive and the LATENT that its prompts start from: so many empty ones for each, one prompt's behind another's.

    A latent_image is taken in their place: with a row for each prompt, or with one, which each starts from, with noise
    of its own. Raises ValueError for another number of rows, and for sizes as `empty_latent` does.
    """
    prompts = prompt_batch.count(positive)
    if latent_image is None:
        latent = empty_latent(model, width, height, prompts * batch_size)
        return prompt_batch.repeated(positive, batch_size), latent
    given = 1 if prompts == 1 else len(latent_image["samples"])
    if given not in (1, prompts):
        raise ValueError(
            f"latent_image has a batch of {given}, but positive holds {prompts} prompts. Give it a batch of "
            f"{prompts}, a picture for each prompt, or of 1, which all of them start from."
        )
    return positive, latent_image if given == prompts else _repeated(latent_image, prompts)


def _repeated(latent: dict, times: int) -> dict:
    """A LATENT of one row so many times; noise is counted on from where the row stood in its batch."""
    repeated = latent | {"samples": latent["samples"].repeat(times, 1, 1, 1)}
    if "batch_index" in latent:
        (first,) = latent["batch_index"]
        repeated["batch_index"] = list(range(first, first + times))
    return repeated


def sample(model, positive: list, latent: dict, seed: int, levels: torch.Tensor, **solving) -> dict:
    """The latent of `sample_and_report`."""
    return sample_and_report(model, positive, latent, seed, levels, **solving)[0]


def sample_and_report(
    model,
    positive: list,
    latent: dict,
    seed: int,
    levels: torch.Tensor,
    solver: str = ode.OFFICIAL,
    tolerance: float = ode.TOLERANCE,
) -> tuple[dict, list[ode.Report]]:
    """The latent at the end of the schedule, as a LATENT with the keys of the given one, and what the solver did: one
    report, or one for each picture where ranks drew them and took other evaluations.

    Guidance is off: as many evaluations as the solver asks for. Raises ValueError for a latent or result with NaN or
    infinity; both are looked at where the model computes, since on a processor of many cores each look takes
    milliseconds.
    """
    start = comfy.sample.fix_empty_latent_channels(
        model,
        latent["samples"].to(model.load_device),
        latent.get("downscale_ratio_spacial"),
        latent.get("downscale_ratio_temporal"),
    )
    _check_start(model, start)
    kept = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio_")}
    outcome = comfy.model_management.intermediate_device()
    if len(levels) < 2:
        return kept | {"samples": start.to(outcome)}, [ode.Report(solver, 0, tolerance, 0, (), ())]
    noise, mask = comfy.sample.prepare_noise(start, seed, latent.get("batch_index")), latent.get("noise_mask")
    on_ranks = _on_ranks(model, positive, solver)
    pictures = len(start) if on_ranks else 1
    callback = latent_preview.prepare_callback(model, (len(levels) - 1) * pictures)
    if on_ranks:
        result, reports = multi.sample(model, positive, noise, start, mask, seed, levels, solver, tolerance, callback)
        reports = ode.common(reports)
        progress.show("\n\n".join(map(str, reports)))  # in place of how ranks share the pictures
        return kept | {"samples": result.to(outcome)}, reports
    if isinstance(model.model.diffusion_model, TurboNextDiT):
        positive = [[states, prompt_batch.unhooked(extra)] for states, extra in positive]
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    guider.set_cfg(1.0)
    reports = []
    result = guider.sample(
        noise,
        start,
        sampler(solver, tolerance, reports.append),
        levels,
        denoise_mask=mask,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return kept | {"samples": result.to(outcome)}, reports


def _on_ranks(model, positive: list, solver: str) -> bool:
    """Whether ranks are to draw the pictures of a run; else they may still evaluate the denoiser for it."""
    if multi.spread_of(model) is None:
        return False
    reason = multi.refusal(model, positive, solver)
    if reason:
        logging.info("Z-Image-Turbo: multi-gpu: this run is not made on ranks as a whole, as %s.", reason)
    return reason is None


def _check_start(model, start: torch.Tensor) -> None:
    channels = model.get_model_object("latent_format").latent_channels
    if start.ndim != 4 or start.shape[1] != channels or start.numel() == 0:
        raise ValueError(
            f"latent_image has the shape {list(start.shape)}, the model takes [batch, {channels}, height / 8, "
            "width / 8]. Use the loader's own VAE in VAE Encode."
        )
    if not torch.isfinite(start).all():
        raise ValueError(
            "latent_image has NaN or infinite values. Look at the node that made it; VAE Encode in fp32 often helps."
        )
