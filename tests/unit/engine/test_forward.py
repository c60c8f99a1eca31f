"""The fast forward against the host's own, on the same module: the same numbers up to rounding."""

import pytest
import torch
from comfy.ldm.lumina.model import NextDiT
from safetensors.torch import load_file, save_file

from zimage_turbo.engine import forward, ode, sampling, turbo
from zimage_turbo.engine.model import load_model
from zimage_turbo.tests.comparison import relative_error
from zimage_turbo.tests.unit.engine.inputs import request_of
from zimage_turbo.tests.weights import small_transformer

# A caption that needs no padding and two that do; sizes whose token count is a multiple of 32 and that is not.
REQUESTS = [(1, 32, 32, 64), (2, 24, 28, 21), (1, 30, 26, 45)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return load_model(small_transformer(tmp_path_factory.mktemp("weights") / "small.safetensors", layers=2), "fp32")


@pytest.mark.parametrize("shape", REQUESTS, ids=str)
def test_equals_the_host(small, shape):
    module, (x, timesteps, context) = small.model.diffusion_model, request_of(*shape)
    ours = module._forward(x, timesteps, context, shape[3])
    theirs = NextDiT._forward(module, x, timesteps, context, shape[3])
    assert module.forwards[turbo.FAST]
    assert relative_error(ours, theirs) < 2e-5


def test_fp16_beyond_its_range(tmp_path):
    """A residual stream and products above 65504, as the official weights have: no infinity, and fp16's own error."""
    path = small_transformer(tmp_path / "loud.safetensors", layers=2)
    weights = load_file(path)
    for name in weights:
        if name.endswith(("attention_norm2.weight", "ffn_norm2.weight")):
            weights[name] *= 20_000
        if name.endswith(("attention.out.weight", "feed_forward.w2.weight")):
            weights[name] *= 3_000
    save_file(weights, path)
    x, timesteps, context = request_of(1, 24, 28, 21)
    exact = load_model(path, "fp32").model.diffusion_model._forward(x, timesteps, context, 21)
    module = load_model(path, "fp16").model.diffusion_model
    inputs_of = []
    for linear in (module.layers[0].attention.qkv, module.layers[1].feed_forward.w2):
        linear.register_forward_pre_hook(lambda _, given: inputs_of.append(given[0].dtype))
    caption = forward.refine_caption(module, context.half(), forward.Compute(torch.float16))
    assert caption.abs().max() > 65504
    ours = module._forward(x.half(), timesteps, context.half(), 21)
    assert relative_error(ours.float(), exact) < 0.01
    assert inputs_of == [torch.float16] * 2
    assert not torch.isfinite(NextDiT._forward(module, x.half(), timesteps, context.half(), 21)).all()


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_a_feed_forward_of_many_rows_is_computed_run_by_run(small, monkeypatch, rows):
    module, (x, timesteps, context) = small.model.diffusion_model, request_of(2, 24, 28, 21)
    whole = module._forward(x, timesteps, context, 21)
    monkeypatch.setattr(forward, "ROWS_AT_ONCE", rows)
    assert relative_error(module._forward(x, timesteps, context, 21), whole) < 2e-6


def test_sampling_takes_the_fast_path(demo):
    patcher, clip, _ = demo
    module = patcher.model.diffusion_model
    before = module.forwards[turbo.FAST]
    positive = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))
    sampling.sample(patcher, positive, sampling.empty_latent(patcher, 0, 0, 1), 1, ode.sigmas())
    assert module.forwards[turbo.FAST] == before + 8


@pytest.mark.parametrize(
    ("options", "arguments", "reason"),
    [
        ({"patches": {"double_block": [print]}}, {}, "patches"),
        ({"rope_options": {"scale_x": 2.0}}, {}, "rope_options"),
        ({"optimized_attention_override": print}, {}, "optimized_attention_override"),
        ({}, {"control": {"output": []}}, "ControlNet"),
        ({}, {"ref_latents": [torch.zeros(1)]}, "ref_latents"),
        ({}, {"unknown": torch.ones(1)}, "unknown"),
        ({}, {"strength": 0.5}, "strength"),
    ],
)
def test_leaves_to_the_host_what_it_does_not_know(small, options, arguments, reason):
    assert reason in forward.refusal(small.model.diffusion_model, torch.zeros(1), options, arguments)


def test_knows_what_samplers_always_pass(small):
    module, options = small.model.diffusion_model, {"patches": {}, "sigmas": torch.ones(1)}
    assert forward.refusal(module, torch.zeros(1), options, {"control": None, "ref_latents": []}) is None


def test_leaves_training_to_the_host(small):
    with torch.inference_mode(False), torch.enable_grad():
        assert "gradients" in forward.refusal(small.model.diffusion_model, torch.zeros(1), {}, {})


def test_an_odd_latent_is_padded_as_the_host_does(small):
    module, (x, timesteps, context) = small.model.diffusion_model, request_of(1, 17, 19, 21)
    ours = module._forward(x, timesteps, context, 21)
    assert ours.shape == x.shape
    assert relative_error(ours, NextDiT._forward(module, x, timesteps, context, 21)) < 2e-5


def hold(norm: torch.nn.Module, **to) -> None:
    norm.weight = torch.nn.Parameter(norm.weight.to(**to), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda norm: setattr(norm, "weight_function", [lambda weight: 2 * weight]), "patched"),
        (lambda norm: hold(norm, dtype=torch.float8_e4m3fn), "float8"),
    ],
    ids=["patched", "float8"],
)
def test_leaves_norms_that_it_cannot_read_to_the_host(tmp_path, change, reason):
    module = load_model(small_transformer(tmp_path / "small.safetensors"), "fp32").model.diffusion_model
    change(module.layers[0].attention.q_norm)
    assert reason in forward.refusal(module, torch.zeros(1), {}, {})


@pytest.mark.parametrize("part", ["", "attention", "feed_forward", "attention_norm1"])
def test_leaves_replaced_and_hooked_blocks_to_the_host(tmp_path, part):
    module = load_model(small_transformer(tmp_path / "small.safetensors"), "fp32").model.diffusion_model
    changed = module.layers[0].get_submodule(part)
    handle = changed.register_forward_hook(lambda *_: None)
    assert f"a {type(changed).__name__} is replaced or hooked" in forward.refusal(module, torch.zeros(1), {}, {})
    handle.remove()
    assert forward.refusal(module, torch.zeros(1), {}, {}) is None
    changed.forward = lambda *given, **named: type(changed).forward(changed, *given, **named)
    assert "replaced" in forward.refusal(module, torch.zeros(1), {}, {})


def test_what_is_given_stays_as_it_is(small):
    """A rehearsal or a want of memory is followed by a second run with the same."""
    module, (x, timesteps, context) = small.model.diffusion_model, request_of(1, 24, 28, 21)
    compute = forward.Compute(torch.float32)
    words = context.clone()
    captions = [forward.refine_caption(module, words, compute) for _ in range(2)]
    given = [x.clone(), timesteps.clone(), captions[0], forward.rotation_table(module, 32, 12, 14, x.device)]
    before = [tensor.clone() for tensor in given]
    results = [forward.denoise(module, compute, *given) for _ in range(2)]
    assert torch.equal(words, context) and torch.equal(*captions) and torch.equal(*results)
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


def test_one_text_for_a_batch(small):
    module, (x, timesteps, context) = small.model.diffusion_model, request_of(2, 24, 28, 21)
    ours = module._forward(x, timesteps, context[:1], 21)
    assert relative_error(ours, NextDiT._forward(module, x, timesteps, context[:1], 21)) < 2e-5


def test_the_caption_is_refined_once_a_prompt_and_anew_where_it_may_change(small):
    module, (x, timesteps, context) = small.model.diffusion_model, request_of(1, 24, 28, 21)
    options = {"uuids": ["a"]}
    once = module._forward(x, timesteps, context, 21, transformer_options=options)
    assert torch.equal(module._forward(x, timesteps, 2 * context, 21, transformer_options=options), once)
    wrapped = options | {"wrappers": {"apply_model": {"mine": [print]}}}
    assert not torch.equal(module._forward(x, timesteps, 2 * context, 21, transformer_options=wrapped), once)
    assert not torch.equal(module._forward(x, timesteps, 2 * context, 21, transformer_options={"uuids": ["b"]}), once)
