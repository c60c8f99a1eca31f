"""The quality report: what is compared, on equal terms, and whole runs with few prompts."""

import itertools
import json
import os
import subprocess
import sys

import comfy.samplers
import numpy as np
import pytest
import torch

from zimage_turbo.benchmarks import perceptual, plots, reference, solver_quality, studio, tag_quality, wordings
from zimage_turbo.demo.lexicon import QUOTES_ZH
from zimage_turbo.demo.prompts import SETS
from zimage_turbo.engine import ode, prompts

DEMO = studio.Source(None, "fp32")
RUN = ("--count", "2", "--batch", "2", "--shown", "2")


@pytest.fixture(scope="module")
def jobs() -> list[studio.Job]:
    with torch.inference_mode():
        drawing = studio.pipeline(DEMO)
        return [
            studio.Job(number, each.text, each.seed, 256, 256, drawing.encode(each.text)[0][0].numpy(), each.said)
            for number, each in enumerate(SETS["full"](4))
        ]


def run(pack, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(pack / "benchmarks" / "quality.py"), *words]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def test_every_sampler_gets_levels_of_its_own(jobs):
    """The host's uni_pc writes into the list that it is given."""
    drawing, seen = studio.pipeline(DEMO), []

    def vandal(model, x, sigmas, extra_args=None, callback=None, disable=None):
        seen.append(sigmas.clone())
        sigmas.fill_(0.5)
        return x

    levels = ode.sigmas(4)
    for _ in range(2):
        studio.latents(drawing, jobs[:1], comfy.samplers.KSAMPLER(vandal), levels)
    assert torch.equal(levels, ode.sigmas(4)) and all(torch.equal(each, levels) for each in seen)
    studio.latents(drawing, jobs[:1], comfy.samplers.sampler_object("uni_pc"), levels)
    assert levels[-1] == 0


@pytest.mark.parametrize("budget", [4, 8])
def test_evaluations_are_those_that_are_stated(jobs, budget):
    drawing = studio.pipeline(DEMO)
    for way in solver_quality.ways([budget], [0.1]):
        _, made = studio.latents(drawing, jobs[:1], way.sampler(), way.levels())
        if way.solver == "heun":
            assert made == 2 * way.steps - 1 and abs(made - budget) == 1
        elif way.solver == "adaptive":
            assert made <= budget
        else:
            assert made == budget, way.name


def test_levels_of_uni_pc_are_those_of_the_host_s_ksampler(jobs):
    model = studio.pipeline(DEMO).model
    by_host = comfy.samplers.KSampler(model, 8, torch.device("cpu"), "uni_pc", "simple", 1.0, {}).sigmas
    (way,) = (way for way in solver_quality.ways([8], []) if way.discards)
    assert torch.equal(way.levels(), by_host)


def test_official_is_the_host_s_euler(jobs):
    drawing = studio.pipeline(DEMO)
    found = [
        studio.latents(drawing, jobs[:1], way.sampler(), way.levels())[0]
        for way in solver_quality.ways([4], [])
        if way.solver in ("official", "euler")
    ]
    assert len(found) == 2 and torch.equal(*found)


def test_a_batch_draws_what_each_of_it_would_be_alone(jobs):
    batch = next(each for each in studio.batches(jobs, 2) if len(each) == 2)
    (way,) = (way for way in solver_quality.ways([4], []) if way.solver == "implicit")
    together, _ = studio.latents(studio.pipeline(DEMO), batch, way.sampler(), way.levels())
    for latent, job in zip(together, batch, strict=True):
        alone, _ = studio.latents(studio.pipeline(DEMO), [job], way.sampler(), way.levels())
        assert solver_quality.relative(latent, alone[0]) < 1e-4


def test_batches_hold_every_job_once_and_equal_lengths(jobs):
    batches = studio.batches(jobs, 2)
    assert sorted(job.number for batch in batches for job in batch) == [0, 1, 2, 3]
    assert all(len(batch) <= 2 and len({job.states.shape for job in batch}) == 1 for batch in batches)


def test_reference_solver_converges_to_a_known_solution():
    """dx/dsigma = x has x · exp(sigma1 - sigma0); order 4 but for the start, whose first steps are short."""
    start = torch.ones(1, 1, dtype=torch.float64)
    exact = np.exp(-1.0)
    errors = [
        abs(float(reference.bashforth(lambda x, level: x, start, ode.sigmas(steps).double().tolist())) - exact)
        for steps in (100, 200, 400)
    ]
    assert all(before > 3 * after for before, after in itertools.pairwise(errors)) and errors[1] < 1e-5


def test_reference_evaluates_the_same_model_in_fp64(jobs, tmp_path):
    """Of one step: the host's model in fp32 differs by its rounding, and no more."""
    (way,) = (way for way in solver_quality.ways([2], []) if way.solver == "euler")
    exact = reference.latents(jobs[:1], DEMO, 1, tmp_path)
    drawn, _ = studio.latents(studio.pipeline(DEMO), jobs[:1], way.sampler(), ode.sigmas(1))
    assert exact.dtype == torch.float64
    assert 0 < solver_quality.relative(drawn.double(), exact) < 1e-5


def test_reference_of_another_checkpoint_is_solved_as_it_was_loaded(jobs, tmp_path, monkeypatch):
    """Here it is the demo again, evaluated through the host in fp32: the same but for rounding."""
    exact = reference.latents(jobs[:1], DEMO, 4, tmp_path)
    drawing, other = studio.pipeline(DEMO), studio.Source(tmp_path, "fp32")
    (tmp_path / "diffusion_models").mkdir()
    (tmp_path / "diffusion_models" / "a.safetensors").write_bytes(b"")
    monkeypatch.setattr(studio, "pipeline", lambda source: drawing)
    monkeypatch.setattr(reference.weight_files, "names", lambda folder: {"diffusion_models": "a.safetensors"})
    solved = reference.latents(jobs[:1], other, 4, tmp_path)
    assert solved.dtype == torch.float64 and 0 < solver_quality.relative(solved, exact) < 1e-5


def test_references_are_kept(jobs, tmp_path, monkeypatch):
    solved = reference.latents(jobs[:1], DEMO, 1, tmp_path)
    monkeypatch.setattr(reference, "_solved", lambda *_: pytest.fail("solved again"))
    assert torch.equal(reference.latents(jobs[:1], DEMO, 1, tmp_path), solved)
    with pytest.raises(pytest.fail.Exception):
        reference.latents(jobs[:1], DEMO, 2, tmp_path)


def test_solvers_end_to_end(pack, tmp_path):
    out = tmp_path / "quality_solvers_cpu.json"
    few = ("--nfe", "4", "--tolerances", "0.05", "--reference-steps", "6", "--timed", "1")
    done = run(pack, "solvers", *RUN, *few, "--references", str(tmp_path / "kept"), "--out", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["prompts"] == 2 and report["reference"]["model"] == "fp64" and report["reference"]["error"] > 0
    rows = {row["name"]: row for row in report["solvers"]}
    assert rows["ours official"]["error"] == rows["host euler"]["error"]
    assert rows["ours implicit"]["against_implicit"]["mean"] == 0
    assert rows["ours implicit"]["error"]["mean"] < rows["ours official"]["error"]["mean"]
    assert rows["host heun, 2 steps"]["evaluations"] == 3 and rows["host heun, 3 steps"]["evaluations"] == 5
    assert rows["ours official"]["scores"]["pictures"]["total"] == 2
    assert set(report["ms_an_evaluation"]) == set(rows) and min(report["ms_an_evaluation"].values()) > 0
    assert report["gallery"]["columns"] == ["reference", *rows]
    assert (tmp_path / report["gallery"]["file"]).stat().st_size
    assert len(list((tmp_path / "kept").iterdir())) == 4  # two prompts, and their check
    kinds = ("gallery", "error", "psnr") if plots.available() else ("gallery",)
    assert {path.name for path in tmp_path.glob("*.png")} == {f"{out.stem}_{kind}.png" for kind in kinds}


def test_tags_end_to_end_in_two_processes(pack, tmp_path):
    out = tmp_path / "quality_tags_cpu.json"
    done = run(pack, "tags", "--count", "1", "--processes", "2", "--shown", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in report["cells"]}
    assert set(rows) == {cell.name for cell in wordings.CELLS} == set(report["gallery"]["columns"])
    assert all(row["scores"]["pictures"]["total"] == 1 for row in rows.values())
    assert rows["Chinese, [zh], own segments"]["against_untagged"].keys() >= {"only_tagged_right", "same_prompt"}
    assert report["pictures_drawn"] < len(rows)
    assert (tmp_path / report["gallery"]["file"]).stat().st_size


def test_a_wording_says_the_same_scene():
    for said in wordings.said(20):
        sign, plain = said.scene.sign.text, said.texts[wordings.Cell(wordings.CHINESE, False)]
        assert all(sign in text for text in said.texts.values())
        assert any(marks.format(sign) in plain for marks in QUOTES_ZH)
        for writing in wordings.WRITINGS:
            typed = said.texts[wordings.Cell(writing.name, False)]
            assert typed != plain and said.texts[wordings.Cell(writing.name, True)] == f"[zh]{typed}[/zh]"


def test_what_tags_repair_becomes_one_prompt():
    """However it is typed, a tagged span reaches the model as the tagged usual form does."""
    clip = studio.pipeline(DEMO).clip
    (said,) = wordings.said(1)
    _, usual = prompts.encode(clip, said.texts[wordings.Cell(wordings.CHINESE, True)])
    for writing in wordings.WRITINGS:
        _, report = prompts.encode(clip, said.texts[wordings.Cell(writing.name, True)])
        assert report.sent == usual.sent, writing.name


def test_cells_whose_prompts_become_the_same_share_a_picture():
    jobs, (numbers,) = tag_quality.encoded(wordings.said(1), DEMO)
    assert sorted(set(numbers.values())) == list(range(len(jobs)))
    one, own = (numbers[wordings.Cell(wordings.MIXED, True, spans)] for spans in prompts.SPANS)
    assert one != own and jobs[one].states.shape != jobs[own].states.shape


def test_perceptual_measures_are_named_when_missing(monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    assert perceptual.available() == [] and perceptual.measured(None, None, "") == {}
    assert set(perceptual.missing()) == {"lpips", "image_reward"}
    assert all("pip install" in reason for reason in perceptual.missing().values())


def test_perceptual_measures_get_what_their_packages_take(monkeypatch):
    """Stand-ins with the packages' own interfaces: LPIPS takes [1, 3, H, W] in -1..1, ImageReward a PIL image."""

    class Distance:
        def __init__(self, net, verbose):
            assert net == "alex"

        def eval(self):
            return self

        def __call__(self, first, second):
            assert first.shape == second.shape == (1, 3, 8, 6) and first.min() == -1 and second.max() == 1
            return (first - second).abs().mean().view(1, 1, 1, 1)

    class Reward:
        def score(self, text, picture):
            assert picture.size == (6, 8)
            return len(text)

    stubs = {"lpips": type("lpips", (), {"LPIPS": Distance}),
             "ImageReward": type("ImageReward", (), {"load": staticmethod(lambda name: Reward())})}  # fmt: skip
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", stubs.get)
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)
    for cached in (perceptual._network, perceptual._judge):
        cached.cache_clear()
    black, white = torch.zeros(8, 6, 3), torch.ones(8, 6, 3)
    assert perceptual.measured(black, white, "four") == {"lpips": 2.0, "image_reward": 4.0}
    for cached in (perceptual._network, perceptual._judge):
        cached.cache_clear()


@pytest.mark.parametrize("words", [["solvers", "--nfe", "1"], ["solvers", "--models", "x"], ["tags", "--nfe", "4"], []])
def test_words_that_cannot_work_are_refused(pack, words):
    done = run(pack, *words)
    assert done.returncode == 2 and "error:" in done.stderr
