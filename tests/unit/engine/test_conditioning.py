"""Text on its way to the model."""

from types import SimpleNamespace

import torch

from zimage_turbo.engine import conditioning, ode, sampling, text, turbo

PATCHER = SimpleNamespace(load_device=torch.device("meta"))


def prepared(model, noise_shape, conds, **options):
    """What the host's prepare_sampling returns."""
    return "model", conds, [options]


def test_states_go_where_the_model_computes_and_nothing_else_does():
    mask, states = torch.ones(1, 3), torch.zeros(1, 3, 8)
    prompt = {"cross_attn": states, "attention_mask": mask, "uuid": "one"}
    conds = {"positive": [prompt, {"uuid": "two"}], "negative": []}
    base, moved, others = conditioning.nearby(prepared, PATCHER, [1], conds, force_full_load=True)
    assert (base, others) == ("model", [{"force_full_load": True}])
    assert moved["negative"] == [] and moved["positive"][1] == {"uuid": "two"}
    first = moved["positive"][0]
    assert first["cross_attn"].device.type == "meta" and first["cross_attn"].shape == states.shape
    assert first["attention_mask"] is mask and first["uuid"] == "one"
    assert prompt["cross_attn"] is states, "the graph's own conditioning stays in main memory"


def test_our_model_moves_its_text_and_still_refines_a_caption_once(demo, monkeypatch):
    patcher, clip, _ = demo
    refined = []
    refine = turbo.forward.refine_caption
    monkeypatch.setattr(turbo.forward, "refine_caption", lambda *given: refined.append(1) or refine(*given))
    asked = []
    monkeypatch.setattr(conditioning, "_moved", lambda prompt, device: asked.append(device) or prompt)
    start = sampling.empty_latent(patcher, 64, 64, 1)
    sampling.sample(patcher, text.encode(clip, "a red star"), start, 1, ode.sigmas(4))
    assert asked == [patcher.load_device] and refined == [1]
