"""The schedule and Euler's method, against the host's and against a solution in closed form."""

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.samplers
import pytest
import torch

from zimage_turbo.engine import ode


def host_schedule() -> comfy.model_sampling.ModelSamplingDiscreteFlow:
    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    sampling.set_parameters(shift=3.0, multiplier=1.0)
    return sampling


def test_official_schedule():
    expected = [1.0, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0.0]
    assert ode.sigmas().tolist() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 9, 12, 20, 50, 99, 100])
def test_schedule_equals_the_hosts_simple_one(steps):
    assert torch.equal(ode.sigmas(steps), comfy.samplers.simple_scheduler(host_schedule(), steps))


@pytest.mark.parametrize("denoise", [0.05, 0.3, 0.5, 0.77, 0.99, 1.0])
def test_denoise_starts_later_with_the_same_number_of_steps(denoise):
    total = int(8 / denoise) if denoise < 1 else 8
    expected = comfy.samplers.simple_scheduler(host_schedule(), total)[-9:]
    assert torch.equal(ode.sigmas(8, denoise), expected)


def test_denoise_zero_is_an_empty_schedule():
    assert len(ode.sigmas(8, 0.0)) == 0


def test_euler_equals_the_hosts_to_the_bit():
    torch.manual_seed(0)
    x, target = torch.randn(3, 16, 8, 10), torch.randn(3, 16, 8, 10)

    def denoise(x, sigma, **_):
        return target * torch.cos(x) * (1 - sigma.view(-1, 1, 1, 1))

    ours = ode.euler(denoise, x, ode.sigmas())
    assert torch.equal(ours, comfy.k_diffusion.sampling.sample_euler(denoise, x, ode.sigmas(), disable=True))


def test_euler_has_order_one():
    """For x0 = k x the flow dx/dsigma = (1 - k) x / sigma has the solution x = x1 sigma^(1 - k)."""
    k, start = -1.0, torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    errors = []
    for steps in (50, 100, 200):
        levels = torch.linspace(1, 0.2, steps + 1, dtype=torch.float64)
        end = ode.euler(lambda x, sigma: k * x, start, levels)
        errors.append(abs(end.item() - 2.0 * 0.2 ** (1 - k)))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_every_step_is_reported_and_may_stop_the_run():
    seen = []

    def on_step(step, clean, x):
        seen.append(step)
        if step == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        ode.euler(lambda x, sigma: x * 0, torch.ones(1, 1, 1, 1), ode.sigmas(), on_step)
    assert seen == [0, 1, 2]
