"""The schedule, Euler's method and the run of a solver, against the host's and against a solution in closed form."""

from itertools import pairwise

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.samplers
import pytest
import torch

from zimage_turbo.engine import ode
from zimage_turbo.tests.flows import gaussian


def host_schedule() -> comfy.model_sampling.ModelSamplingDiscreteFlow:
    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    sampling.set_parameters(shift=3.0, multiplier=1.0)
    return sampling


@pytest.fixture
def solvers(monkeypatch):
    """What is registered in a test is forgotten after it."""
    monkeypatch.setattr(ode, "SOLVERS", dict(ode.SOLVERS))


# --- The schedule ---


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


# --- The official solver ---


@pytest.mark.parametrize("steps", [1, 4, 8, 20])
def test_official_equals_the_hosts_euler_to_the_bit(steps):
    torch.manual_seed(0)
    x, target = torch.randn(3, 16, 8, 10), torch.randn(3, 16, 8, 10)

    def denoise(x, sigma, **_):
        return target * torch.cos(x) * (1 - sigma.view(-1, 1, 1, 1))

    ours, _ = ode.solve("official", denoise, x, ode.sigmas(steps))
    assert torch.equal(ours, comfy.k_diffusion.sampling.sample_euler(denoise, x, ode.sigmas(steps), disable=True))


def test_official_has_order_one():
    errors = gaussian.errors("official", (40, 80, 160))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_official_estimates_its_local_errors():
    """What it estimates of steps is near what they err by from the exact solution; the last step has no estimate."""
    levels = gaussian.levels(200)
    _, report = ode.solve("official", gaussian.denoise, gaussian.exact(1.0), levels)
    true = []
    for before, after in pairwise(levels[:-1].tolist()):
        start = gaussian.exact(before)
        end, _ = ode.solve("official", gaussian.denoise, start, torch.tensor([before, after], dtype=torch.float64))
        true.append((end - gaussian.exact(after)).square().mean().sqrt().item())
    assert report.errors == pytest.approx(true, rel=0.1)


# --- Runs ---


@pytest.mark.parametrize("solver", ode.SOLVERS)
def test_the_report_says_where_the_model_was_evaluated(solver):
    seen = []

    def denoise(x, sigma):
        assert sigma.shape == (2,) and sigma[0] == sigma[1]
        seen.append(sigma[0].item())
        return torch.cos(3 * x) * sigma.view(-1, 1, 1, 1)

    _, report = ode.solve(solver, denoise, torch.randn(2, 4, 3, 3), ode.sigmas(), tolerance=0.05)
    assert report.solver == solver and report.budget == 8
    assert report.nfe == len(seen) == len(report.sigmas) - 1 == len(report.errors) + 1
    assert report.sigmas == pytest.approx([*seen, 0.0], rel=1e-5)
    assert report.sigmas[0] == 1 and report.sigmas[-1] == 0
    assert str(report).startswith(f"{solver}: {report.nfe} of 8 evaluations\nsigmas: 1 ")
    assert report.as_dict()["errors"] == report.errors


@pytest.mark.parametrize("solver", ode.SOLVERS)
def test_every_evaluation_is_told_and_may_stop_the_run(solver):
    told = []

    def on_evaluation(number, clean, x, sigma):
        told.append((number, clean.shape, x.shape, sigma.shape))
        if number == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        ode.solve(
            solver, lambda x, sigma: x * 0, torch.ones(1, 1, 1, 1), ode.sigmas(), 0.0, on_evaluation=on_evaluation
        )
    assert told == [(number, (1, 1, 1, 1), (1, 1, 1, 1), ()) for number in range(3)]


@pytest.mark.parametrize("solver", ode.SOLVERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("number", [0, 3, 7])
def test_a_model_that_overflows_is_an_error(solver, bad, number):
    calls = iter(range(8))

    def denoise(x, sigma):
        return x * bad if next(calls) == number else torch.zeros_like(x)

    with pytest.raises(ValueError, match=r"NaN or infinite values.*precision"):
        ode.solve(solver, denoise, torch.ones(1, 1, 1, 1), ode.sigmas(), 0.0)


def test_no_solver_gets_more_than_its_budget(solvers):
    def greedy(run, x, levels):
        for _ in range(9):
            x = x - run.velocity(x, levels[0]) / 9
        return x

    ode.register("greedy", greedy)
    with pytest.raises(RuntimeError, match="more than its 8 evaluations"):
        ode.solve("greedy", lambda x, sigma: x * 0, torch.ones(1, 1), ode.sigmas())


def test_a_solver_of_ones_own_is_run_by_its_name(solvers):
    def coarse(run, x, levels):
        for level, after in pairwise([*levels[:-1:2], levels[-1]]):
            x = x + run.velocity(x, level) * (after - level)
        return x

    ode.register("coarse", coarse)
    x = torch.randn(2, 4, 3, 3)
    ours, report = ode.solve("coarse", lambda x, sigma: torch.sin(x), x, ode.sigmas(8))
    expected, _ = ode.solve("official", lambda x, sigma: torch.sin(x), x, ode.sigmas(4))
    assert torch.equal(ours, expected)
    assert (report.nfe, report.budget, report.errors) == (4, 8, ())
    with pytest.raises(ValueError, match=r"'coarse' is taken.*official, implicit, adaptive, coarse"):
        ode.register("coarse", coarse)


def test_an_unknown_solver_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"solver is 'rk45'.*official, implicit, adaptive"):
        ode.solve("rk45", lambda x, sigma: x, torch.ones(1, 1), ode.sigmas())


@pytest.mark.parametrize("solver", ["implicit", "adaptive"])
@pytest.mark.parametrize(
    ("levels", "complaint"),
    [
        ([1.0, 0.5, 0.5, 0.0], "number 2 is 0.5 after 0.5"),
        ([0.0, 0.5, 1.0], "number 1 is 0.5 after 0"),
        ([1.0, 0.5, -0.1], "number 2 is -0.1 after 0.5"),
        ([1.0, float("nan"), 0.0], "number 1 is nan after 1"),
    ],
)
def test_sigmas_that_do_not_descend_are_named(solver, levels, complaint):
    with pytest.raises(ValueError, match=rf"sigmas must descend.*{complaint}.*'official'"):
        ode.solve(solver, lambda x, sigma: x, torch.ones(1, 1), torch.tensor(levels))
