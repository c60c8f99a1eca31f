"""The sampler's solvers on the demo, through the nodes and the host's own sampling."""

import json

import comfy.model_management
import comfy.samplers
import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import latent_preview
import pytest
import torch
from comfy.cli_args import args

import nodes
from zimage_turbo.engine import ode, progress, prompt_batch, prompts, sampling, text
from zimage_turbo.nodes.sampler import ZImageTurboSampler
from zimage_turbo.nodes.sigmas import ZImageTurboSigmas
from zimage_turbo.tests.comparison import relative_error

SMALL = {"steps": 4, "denoise": 1.0, "width": 64, "height": 64, "batch_size": 1}
each_solver = pytest.mark.parametrize("solver", ["official", "implicit", "adaptive"])


@pytest.fixture(scope="module")
def positive(demo):
    with torch.inference_mode():
        return text.encode(demo[1], "a red circle")


def draw(patcher, positive, seed=5, **changes):
    """(latent, report, what stands on the node)"""
    output = ZImageTurboSampler.execute(patcher, positive, seed, **(SMALL | changes))
    latent, report = output.args
    return latent["samples"], json.loads(report), output.ui.as_dict()["text"][0]


@pytest.fixture
def evaluations(demo):
    """(a clone of the demo, the noise levels at which it is evaluated)"""
    patcher, seen = demo[0].clone(), []

    def wrapper(apply, arguments):
        seen.append(arguments["timestep"].tolist())
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])

    patcher.set_model_unet_function_wrapper(wrapper)
    return patcher, seen


@pytest.fixture
def listen(monkeypatch):
    """Lets a function hear the progress that the front end hears, each step with a preview."""
    monkeypatch.setattr(args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    yield comfy.utils.set_progress_bar_global_hook
    comfy.utils.set_progress_bar_global_hook(None)


def test_official_is_the_hosts_euler_simple_to_the_bit(demo, positive):
    """fp32 on the CPU, eight steps at the demo's own size; also the default of graphs that name no solver."""
    latent = sampling.empty_latent(demo[0], 0, 0, 1)
    theirs = nodes.KSampler().sample(demo[0], 5, 8, 1.0, "euler", "simple", positive, positive, latent)[0]["samples"]
    ours, report, _ = draw(demo[0], positive, steps=8, width=0, height=0)
    assert torch.equal(ours, theirs)
    assert report["solver"] == "official" and report["nfe"] == 8


@each_solver
def test_the_report_counts_what_the_model_was_asked(evaluations, positive, solver):
    patcher, seen = evaluations
    _, report, shown = draw(patcher, positive, solver=solver, steps=8)
    assert len(seen) == report["nfe"] == len(report["errors"]) + 1
    assert [sigma for (sigma,) in seen] == pytest.approx(report["sigmas"][:-1], rel=1e-5)
    assert report["sigmas"][0] == 1 and report["sigmas"][-1] == 0
    assert (report["nfe"] < 8) == (solver == "adaptive")
    assert shown.splitlines()[0] == f"{solver}: {report['nfe']} of 8 evaluations"


@each_solver
def test_every_evaluation_is_a_step_of_progress_with_a_preview(demo, positive, listen, solver):
    told = []
    listen(lambda value, total, preview, node_id=None: told.append((value, total, preview[1].size)))
    _, report, _ = draw(demo[0], positive, solver=solver, steps=6)
    assert told == [(number, 6, (8, 8)) for number in range(1, report["nfe"] + 1)]


@each_solver
def test_cancelling_takes_effect_between_evaluations(evaluations, positive, listen, solver):
    patcher, seen = evaluations

    def cancel_at_the_second(value, total, preview, node_id=None):
        if value == 2:
            comfy.model_management.interrupt_current_processing(True)

    listen(cancel_at_the_second)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            draw(patcher, positive, solver=solver, steps=8)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert 2 <= len(seen) <= 3


@each_solver
def test_the_stock_sampler_gives_the_same(demo, positive, solver, monkeypatch):
    shown = []
    monkeypatch.setattr(progress, "show", shown.append)
    levels, sampler = ZImageTurboSigmas.execute(4, 1.0, solver=solver, tolerance=0.1).args
    guider = custom.BasicGuider.execute(demo[0], positive)[0]
    latent = sampling.empty_latent(demo[0], 64, 64, 1)
    theirs = custom.SamplerCustomAdvanced.execute(custom.Noise_RandomNoise(5), guider, sampler, levels, latent)[0]
    ours, _, on_node = draw(demo[0], positive, solver=solver, tolerance=0.1)
    assert torch.equal(theirs["samples"], ours)
    assert shown == [on_node.partition("\n\nThis model was trained")[0]] * 2  # on the stock node, then on ours


@each_solver
def test_half_a_schedule_goes_on_in_a_second_sampler(demo, positive, solver):
    levels, sampler = ZImageTurboSigmas.execute(6, 1.0, solver=solver, tolerance=0.0).args
    high, low = custom.SplitSigmas.execute(levels, 3).args
    guider = custom.BasicGuider.execute(demo[0], positive)[0]
    half = sampling.empty_latent(demo[0], 64, 64, 1)
    for noise, part in ((custom.Noise_RandomNoise(5), high), (custom.Noise_EmptyNoise(), low)):
        half = custom.SamplerCustomAdvanced.execute(noise, guider, sampler, part, half)[0]
    whole, _, _ = draw(demo[0], positive, solver=solver, steps=6, tolerance=0.0)
    assert relative_error(half["samples"], whole) < (1e-5 if solver == "official" else 0.2)


@each_solver
def test_image_to_image_and_masks(evaluations, positive, solver):
    patcher, seen = evaluations
    start, _, _ = draw(patcher, positive)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    seen.clear()
    latent = {"samples": start, "noise_mask": mask}
    painted, report, _ = draw(patcher, positive, seed=7, denoise=0.6, latent_image=latent, solver=solver)
    assert relative_error(painted[..., 4:], start[..., 4:]) < 1e-3 < relative_error(painted[..., :4], start[..., :4])
    assert len(seen) == report["nfe"] <= report["budget"] == 4
    assert report["sigmas"][0] == pytest.approx(ode.sigmas(4, 0.6)[0].item(), rel=1e-5)


@each_solver
def test_a_batch_keeps_its_shape_and_its_rows_the_same_level(evaluations, positive, solver):
    patcher, seen = evaluations
    samples, report, _ = draw(patcher, positive, solver=solver, batch_size=3, steps=6)
    assert samples.shape == (3, 16, 8, 8)
    assert len(seen) == report["nfe"] <= 6
    assert all(len(row) == 3 and len(set(row)) == 1 for row in seen)


LINES = ("a red circle", "two large purple hearts on a small sign, mint background, and whatever fits beside them")


@pytest.fixture
def several(demo):
    return prompt_batch.gathered([prompts.encode(demo[1], line)[0] for line in LINES])


@each_solver
def test_pictures_of_a_prompt_stand_side_by_side(evaluations, demo, several, solver):
    """Each from the noise of its place, as the host draws a part of a batch; all take the same steps."""
    patcher, seen = evaluations
    samples, report, _ = draw(patcher, several, solver=solver, batch_size=2, tolerance=0.0)
    assert len(seen) == report["nfe"] and samples.shape == (4, 16, 8, 8)
    for number, row in enumerate(samples):
        latent = {"samples": torch.zeros(1, 16, 8, 8), "batch_index": [number]}
        (one,), _, _ = draw(
            patcher, text.encode(demo[1], LINES[number // 2]), latent_image=latent, solver=solver, tolerance=0.0
        )
        assert relative_error(row, one) < 1e-5


def test_every_prompt_starts_from_a_picture(demo, several):
    """One for all, or one for each; each with noise of its own."""
    pictures = torch.randn(2, 16, 8, 8)
    each = draw(demo[0], several, denoise=0.5, latent_image={"samples": pictures})[0]
    same = draw(demo[0], several, denoise=0.5, latent_image={"samples": pictures[:1]})[0]
    assert torch.equal(same, draw(demo[0], several, denoise=0.5, latent_image={"samples": pictures[[0, 0]]})[0])
    assert torch.equal(each[0], same[0]) and not torch.equal(each[1], same[1])
    later = {"samples": pictures[:1], "batch_index": [4]}
    expected = {"samples": pictures[[0, 0]], "batch_index": [4, 5]}
    assert torch.equal(*(draw(demo[0], several, denoise=0.5, latent_image=latent)[0] for latent in (later, expected)))


@pytest.mark.parametrize("given", [3, 4])
def test_pictures_that_are_not_as_many_as_the_prompts(demo, several, given):
    with pytest.raises(
        ValueError, match=rf"latent_image has a batch of {given}, but positive holds 2 prompts.* of 2, "
    ):
        draw(demo[0], several, latent_image={"samples": torch.randn(given, 16, 8, 8)})


def test_our_sampler_takes_the_hook_off_our_model_alone(demo, several, monkeypatch):
    """With any hook the host reloads a model that has dynamic VRAM."""
    hooked = []
    set_conds = comfy.samplers.CFGGuider.inner_set_conds
    monkeypatch.setattr(
        comfy.samplers.CFGGuider,
        "inner_set_conds",
        lambda self, conds: hooked.append("hooks" in conds["positive"][0][1]) or set_conds(self, conds),
    )
    draw(demo[0], several, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "TurboNextDiT", type(None))
        draw(demo[0], several, steps=1)
    assert hooked == [False, True]


def test_denoise_zero_evaluates_nothing(evaluations, positive):
    patcher, seen = evaluations
    start = torch.randn(1, 16, 8, 8)
    samples, report, _ = draw(patcher, positive, denoise=0.0, latent_image={"samples": start}, solver="adaptive")
    assert torch.equal(samples, start)
    assert seen == [] and report["nfe"] == 0


@each_solver
def test_a_model_that_overflows_is_named(demo, positive, solver):
    patcher = demo[0].clone()
    patcher.set_model_unet_function_wrapper(lambda apply, arguments: arguments["input"] * float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinite values.*precision to bf16"):
        draw(patcher, positive, solver=solver)


def test_a_registered_solver_can_be_chosen_in_both_nodes(demo, positive, monkeypatch):
    def one_step(run, x, levels):
        return x + run.velocity(x, levels[0]) * (levels[-1] - levels[0])

    monkeypatch.setattr(ode, "SOLVERS", dict(ode.SOLVERS))
    ode.register("one step", one_step)
    for node in (ZImageTurboSampler, ZImageTurboSigmas):
        (solver,) = [part for part in node.define_schema().inputs if part.id == "solver"]
        assert solver.options == ["official", "implicit", "adaptive", "one step"]
    ours, report, _ = draw(demo[0], positive, solver="one step")
    expected, _, _ = draw(demo[0], positive, steps=1)
    assert torch.equal(ours, expected)
    assert (report["nfe"], report["budget"]) == (1, 4)


@pytest.mark.parametrize("node", [ZImageTurboSampler, ZImageTurboSigmas])
def test_values_of_older_workflows_keep_their_places(node):
    """Saved workflows hold widget values by place: what is new comes last, and may be absent."""
    inputs = node.define_schema().inputs
    assert [part.id for part in inputs[-2:]] == ["solver", "tolerance"]
    assert all(part.optional for part in inputs[-2:])


def test_a_size_that_the_demo_does_not_know_is_told_of(demo, positive):
    assert "trained on pictures of 192 to 384 pixels a side. At 64 × 64" in draw(demo[0], positive)[2]
    assert "trained on" not in draw(demo[0], positive, width=192, height=256)[2]


@pytest.mark.parametrize("denoise", [float("nan"), -0.5, 1.5])
def test_a_denoise_that_is_none_is_refused(denoise):
    with pytest.raises(ValueError, match=r"denoise is .*Use a number from 0 to 1"):
        ode.sigmas(8, denoise)
