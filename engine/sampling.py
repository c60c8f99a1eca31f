"""Running the sampler on a MODEL of the host: noise, guidance off, progress, previews, interruption."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch

from . import ode
from .model import LATENT_SCALE, NATIVE_SIZE

SIZE_STEP = 16


def sampler() -> comfy.samplers.KSAMPLER:
    """Our Euler method as a SAMPLER that SamplerCustomAdvanced takes."""
    return comfy.samplers.KSAMPLER(_euler)


def empty_latent(model, width: int, height: int, batch_size: int) -> dict:
    """Zeros [batch, 16, height / 8, width / 8]; a side of 0 is the size that the model was trained at.

    Raises ValueError for a side that is not a multiple of 16 pixels.
    """
    native = model.get_attachment(NATIVE_SIZE) or 1024
    sides = {"width": width or native, "height": height or native}
    for name, side in sides.items():
        if side % SIZE_STEP:
            below = max(SIZE_STEP, side // SIZE_STEP * SIZE_STEP)
            raise ValueError(
                f"{name} is {side}, but sides are multiples of {SIZE_STEP} pixels. Use {below} or {below + SIZE_STEP}."
            )
    shape = (batch_size, 16, sides["height"] // LATENT_SCALE, sides["width"] // LATENT_SCALE)
    return {"samples": torch.zeros(shape, device=model.load_device)}


def sample(model, positive: list, latent: dict, seed: int, levels: torch.Tensor) -> dict:
    """The latent at the end of the schedule, as a LATENT with the keys of the given one.

    All is checked where the model computes: on a processor of many cores each look at a latent takes milliseconds.
    Guidance is off: one evaluation a step. Raises ValueError for a latent or result with NaN or infinity.
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
        return kept | {"samples": start.to(outcome)}
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive})
    guider.set_cfg(1.0)
    result = guider.sample(
        comfy.sample.prepare_noise(start, seed, latent.get("batch_index")),
        start,
        sampler(),
        levels,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, len(levels) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    finite = torch.isfinite(result).all()  # before the copy, which waits for the result anyway
    result = result.to(outcome)
    if not finite:
        raise ValueError(
            "The sampler's result has NaN or infinite values: the model overflowed in "
            f"{model.model.get_dtype_inference()}. Set the loader's precision to bf16 or fp32."
        )
    return kept | {"samples": result}


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


def _euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """ode.euler in the form that the host's KSAMPLER calls."""
    extra_args = extra_args or {}

    def on_step(step, clean, current):
        comfy.model_management.throw_exception_if_processing_interrupted()
        if callback is not None:
            callback({"x": current, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": clean})

    return ode.euler(lambda current, sigma: model(current, sigma, **extra_args), x, sigmas, on_step)
