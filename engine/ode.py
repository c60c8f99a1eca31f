"""The sampler's arithmetic: the flow-matching schedule and Euler's method, without ComfyUI."""

import torch

SHIFT = 3.0
NFE = 8
TRAINING_STEPS = 1000


def sigmas(steps: int = NFE, denoise: float = 1.0, shift: float = SHIFT) -> torch.Tensor:
    """Descending noise levels [steps + 1] fp32 from 1 to 0, every step one model evaluation (NFE).

    Evenly spaced training timesteps t, each shifted: sigma = shift · t / (1 + (shift - 1) · t); the official schedule
    of Z-Image-Turbo at 8 steps and shift 3. ``denoise`` below 1 keeps the number of steps and starts later on the curve
    of steps / denoise steps. denoise 0 gives an empty schedule.
    """
    if denoise <= 0.0:
        return torch.zeros(0)
    total = steps if denoise > 0.9999 else int(steps / denoise)
    places = [TRAINING_STEPS - int(step * TRAINING_STEPS / total) for step in range(total)]
    time = torch.tensor(places, dtype=torch.float32) / TRAINING_STEPS
    levels = shift * time / (1 + (shift - 1) * time)
    return torch.cat((levels, torch.zeros(1)))[-(steps + 1) :]


def euler(denoise, x: torch.Tensor, levels: torch.Tensor, on_step=None) -> torch.Tensor:
    """Integrates dx/dsigma = (x - x0) / sigma with Euler's method, one evaluation a step.

    denoise(x, sigma [batch]) returns the predicted clean latent x0 with the shape of x; levels [steps + 1] descends.
    on_step(step, x0, x) is called before each update; raising in it stops the run.
    """
    ones = x.new_ones([x.shape[0]])
    for step in range(len(levels) - 1):
        clean = denoise(x, levels[step] * ones)
        if on_step is not None:
            on_step(step, clean, x)
        slope = (x - clean) / levels[step]
        x = x + slope * (levels[step + 1] - levels[step])
    return x
