"""What /health tells of our models, by which path their forwards went, and of ranks and their GPUs."""

from types import SimpleNamespace

import comfy.model_management as management
import pytest
import torch

from zimage_turbo.engine import catalogue, loading, ode, sampling, text, turbo
from zimage_turbo.server import health

PROMPT = "a red circle"


@pytest.fixture
def models(monkeypatch):
    """MODEL, CLIP and VAE of the demo on the processor, the only models that the host holds as soon as they run."""
    monkeypatch.setattr(management, "current_loaded_models", [])
    return loading.load(catalogue.resolve("demo", "auto", "auto"), "auto", torch.device("cpu"))


def draw(patcher, clip) -> torch.Tensor:
    start = sampling.empty_latent(patcher, 128, 128, 1)
    return sampling.sample(patcher, text.encode(clip, PROMPT), start, 1, ode.sigmas())["samples"]


def told() -> dict[str, dict]:
    return {entry["model"]: entry["forwards"] for entry in health.loaded_models()}


def test_forwards_of_all_three_are_counted(models):
    patcher, clip, vae = models
    picture = vae.decode(draw(patcher, clip))
    assert picture.shape == (1, 128, 128, 3)
    names = [type(model.model).__name__ for model in (patcher, clip.patcher, vae.patcher)]
    assert told() == dict(zip(names, ({turbo.FAST: 8}, {turbo.FAST: 1}, {"it runs on cpu": 1}), strict=True))


def test_what_the_host_had_to_compute_is_told_with_the_reason(models):
    patcher, clip, _ = models
    patched = patcher.clone()
    patched.set_model_attn1_patch(lambda *given: given)
    draw(patcher, clip)
    draw(patched, clip)
    assert told()["Lumina2"] == {turbo.FAST: 8, "transformer_options has patches": 8}


def test_each_rank_is_told_of_with_its_gpu(monkeypatch):
    """As the driver's id says, which numbers GPUs in its own order; a GPU of another machine is not known here."""
    ranks = [{"rank": 0, "uuid": "GPU-b"}, {"rank": 1, "uuid": "GPU-elsewhere"}, {"rank": 2}]
    monkeypatch.setattr(health, "current", SimpleNamespace(document=lambda: {"state": "ok", "ranks": ranks}))
    first, second = {"name": "one", "uuid": "GPU-a"}, {"name": "one", "uuid": "GPU-b", "nvlinks": 18}
    state = health.multi_gpu([first, second, {"error": "of a driver that says no more"}])
    assert state == {"state": "ok", "ranks": [{"rank": 0, "uuid": "GPU-b", "gpu": second}, *ranks[1:]]}
