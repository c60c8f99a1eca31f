"""The text encoder on a GPU, with random weights of the official sizes: as exact as 16 bits allow, graphs included."""

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.text_encoders.z_image import Qwen3_4BModel
from safetensors.torch import save_file

from zimage_turbo.engine import encoder, graphs, text, turbo
from zimage_turbo.tests.comparison import relative_error
from zimage_turbo.tests.gpu import kernels
from zimage_turbo.tests.weights import random_text_encoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 20 * 2**30,
        reason="the weights of Qwen3-4B and the reference take 16 GB of GPU memory",
    ),
]
COUNTS = [5, 20, 32, 64, 77, 300]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text_encoders") / "qwen_3_4b_random.safetensors"
    save_file({name: weight.cpu() for name, weight in random_text_encoder({}, "cuda").items()}, path)
    return path


@pytest.fixture(scope="module", params=["auto", "int4"])
def clip(file, request):
    with torch.inference_mode():
        clip = text.load_text_encoder(file, torch.device("cuda:0"), precision=request.param)
        clip.load_model()
        clip.cond_stage_model.set_clip_options({"execution_device": torch.device("cuda:0")})
        yield clip
        comfy.model_management.unload_all_models()


def tokens(count: int) -> list[list[int]]:
    return [torch.randint(0, 150_000, (count,), generator=torch.Generator().manual_seed(count)).tolist()]


def test_within_twice_the_error_of_bf16(clip):
    """Against the host's own forward, which computes in fp32, with the same weights; its own error in bf16 measures."""
    module = clip.cond_stage_model.qwen3_4b
    for count in COUNTS:
        exact = Qwen3_4BModel.forward(module, tokens(count))[0]
        embeds, mask, counts, _ = module.process_tokens(tokens(count), torch.device("cuda:0"))
        model = module.transformer.model
        theirs = model(None, mask, embeds.bfloat16(), counts, module.layer_idx, False)[1].float()
        ours, _, extra = module.forward(tokens(count))
        print(
            f"{count} tokens: host's bf16 {relative_error(theirs, exact):.2e}, ours {relative_error(ours, exact):.2e}"
        )
        assert torch.equal(extra["attention_mask"], mask)
        assert 0 < relative_error(theirs, exact) < 0.5
        assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact)


def test_a_first_prompt_has_the_kernels_of_all_lengths_compiled(file, monkeypatch):
    """In INT4 there are others for few tokens, which a later prompt would wait for, one after another."""
    clip = text.load_text_encoder(file, torch.device("cuda:0"), precision="int4")
    clip.load_model()
    clip.cond_stage_model.set_clip_options({"execution_device": torch.device("cuda:0")})
    module, compiled = clip.cond_stage_model.qwen3_4b, kernels.forgotten(monkeypatch)
    module.forward(tokens(77))
    assert compiled and all(aside for _, aside in compiled)
    compiled.clear()
    for count in COUNTS:
        module.forward(tokens(count))
    assert not compiled


def test_pages_within_twice_the_error_of_bf16(clip, monkeypatch):
    """None are kept on a GPU; where they are asked for, what they give is as exact as the rest."""
    module, style = clip.cond_stage_model.qwen3_4b, tokens(300)[0]
    module.forward([style])
    assert module.pool.pages is None
    monkeypatch.setattr(encoder, "PAGED", ("cuda",))
    module.forwards.clear()
    for tail in (tokens(20)[0], tokens(77)[0]):
        ids = [style + tail]
        exact, ours = Qwen3_4BModel.forward(module, ids)[0], module.forward(ids)[0]
        embeds, mask, counts, _ = module.process_tokens(ids, torch.device("cuda:0"))
        model = module.transformer.model
        theirs = model(None, mask, embeds.bfloat16(), counts, module.layer_idx, False)[1].float()
        assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact)
    assert module.forwards == {turbo.FAST: 1, encoder.PREFIXED: 1}
    module.pool.clear()


def test_replay_is_what_would_be_computed(clip):
    module = clip.cond_stage_model.qwen3_4b
    module.graphs.clear()
    module.forwards.clear()
    eager = {count: module.forward(tokens(count))[0] for count in (20, 64, 300)}
    assert dict(module.forwards) == {turbo.FAST: 3 * graphs.WARM_UP}
    for _ in range(2):
        for count, states in eager.items():
            assert torch.equal(module.forward(tokens(count))[0], states)
    assert module.forwards[turbo.REPLAYED] == 6


def test_a_bucket_serves_all_its_lengths(clip):
    """Lengths of one bucket are replayed by one graph, and what a longer prompt left behind is not seen."""
    module = clip.cond_stage_model.qwen3_4b
    module.graphs.clear()
    for count in (64, 64):
        module.forward(tokens(count))
    before = module.forwards[turbo.FAST]
    for count in (33, 40, 63):
        exact = Qwen3_4BModel.forward(module, tokens(count))[0]
        assert relative_error(module.forward(tokens(count))[0], exact) < 0.1
    assert module.forwards[turbo.FAST] == before and len(module.graphs.captured.values) == 1


def test_lora_and_unloading_leave_no_trace(clip):
    prompt, name = "a red circle", "qwen3_4b.transformer.model.layers.3.mlp.down_proj.weight"

    def states(of) -> torch.Tensor:
        return of.encode_from_tokens(of.tokenize(prompt))

    before = [states(clip) for _ in range(3)][-1]
    changed = clip.clone()
    generator = torch.Generator().manual_seed(1)
    changed.add_patches({name: (torch.randn(2560, 9728, generator=generator) * 0.05,)}, 1.0)
    for _ in range(3):
        merged = [states(changed) for _ in range(3)]
        assert torch.equal(merged[0], merged[-1]) and relative_error(merged[0], before) > 1e-3
        assert torch.equal(states(clip), before)
    comfy.model_management.unload_all_models()
    module = clip.cond_stage_model.qwen3_4b
    assert not module.graphs.captured.values
    assert all(torch.equal(states(clip), before) for _ in range(3))
