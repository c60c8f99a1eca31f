"""The text encoder's fast forward against the host's own, on the same module; and its INT4 storage."""

import json
import shutil

import comfy.model_management as management
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.text_encoders.z_image import Qwen3_4BModel
from safetensors.torch import save_file

from zimage_turbo.engine import cache_file, catalogue, encoder, formats, quantiser, qwen, residency, text, turbo
from zimage_turbo.engine.checkpoint import Checkpoint
from zimage_turbo.kernels import int4
from zimage_turbo.server import health
from zimage_turbo.tests.comparison import relative_error

CPU = torch.device("cpu")
FOLDER = catalogue.DEMO_FOLDER / "text_encoder"
ROUNDING = 2e-6  # of fp32 through five layers
PROJECTION = "qwen3_4b.transformer.model.layers.{}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def clip():
    with torch.inference_mode():
        return text.load_text_encoder(FOLDER, CPU)


@pytest.fixture(scope="module")
def packed():
    with torch.inference_mode():
        return text.load_text_encoder(FOLDER, CPU, precision="int4")


@pytest.fixture
def module(clip):
    inner = clip.cond_stage_model.qwen3_4b
    inner.reset_clip_options()
    inner.forwards.clear()
    inner.pool.clear()
    return inner


@pytest.fixture
def folder(tmp_path):
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(catalogue.DEMO_FOLDER / part, tmp_path / part)
    return tmp_path / "text_encoder"


def tokens(count: int, seed: int = 0) -> list[list[int]]:
    return [torch.randint(1, 900, (count,), generator=torch.Generator().manual_seed(seed)).tolist()]


def states(of, prompt: str = "a red circle") -> torch.Tensor:
    return of.encode_from_tokens(of.tokenize(prompt))


def down_proj(of, layer: int = 0) -> torch.nn.Module:
    return of.cond_stage_model.qwen3_4b.transformer.model.layers[layer].mlp.down_proj


def test_what_is_given_stays_as_it_is(module):
    """A rehearsal or a want of memory is followed by a second run with the same."""
    model = module.transformer.model
    embeds = torch.randn(1, 32, 256, generator=torch.Generator().manual_seed(4))
    given = embeds.clone(), qwen.rotation_table(model, 32, CPU)
    first, second = (qwen.run_layers(model.layers, torch.float32, *given) for _ in range(2))
    assert torch.equal(given[0], embeds) and torch.equal(first, second)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_equals_the_host_at_any_length(module, count):
    ours, pooled, extra = module.forward(tokens(count))
    theirs, _, theirs_extra = Qwen3_4BModel.forward(module, tokens(count))
    assert module.forwards == {turbo.FAST: 1}
    assert ours.dtype == theirs.dtype == torch.float32 and pooled is None
    assert relative_error(ours, theirs) < ROUNDING
    assert torch.equal(extra["attention_mask"], theirs_extra["attention_mask"])


def test_what_pads_a_bucket_is_not_seen(module):
    """Longer and shorter prompts of a bucket have the same states where their tokens are the same."""
    long = module.forward(tokens(60))[0]
    short = module.forward([tokens(60)[0][:40]])[0]
    assert relative_error(short, long[:, :40]) < ROUNDING


def test_several_texts_at_once(module):
    both = tokens(40) + tokens(40, seed=1)
    assert relative_error(module.forward(both)[0], Qwen3_4BModel.forward(module, both)[0]) < ROUNDING


@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 3, None])
def test_equals_the_host_at_any_layer(module, layer):
    """None: behind the last layer's norm, what the host's "last" means."""
    module.set_clip_options({"layer": layer})
    ours = module.forward(tokens(20))[0]
    assert relative_error(ours, Qwen3_4BModel.forward(module, tokens(20))[0]) < ROUNDING
    assert module.forwards == {turbo.FAST: 1}


def test_layers_behind_the_wanted_one_do_not_run(clip, module):
    ran = []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(module.transformer.model.layers)
    ]
    states(clip)
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2, 3]  # of five, as for Qwen3-4B 35 of 36


def test_an_embedding_among_the_tokens(module):
    """A textual inversion brings vectors of its own."""
    vectors = torch.randn(3, 256, generator=torch.Generator().manual_seed(4)) * 0.1
    mixed = [[5, 6, vectors, 7]]
    ours, _, extra = module.forward(mixed)
    assert ours.shape[1] == 6 == extra["attention_mask"].sum()
    assert relative_error(ours, Qwen3_4BModel.forward(module, mixed)[0]) < ROUNDING
    assert module.forwards == {turbo.FAST: 1}


@pytest.mark.parametrize("layer", [[0, 2], [1]], ids=str)
def test_several_layers_are_the_hosts(module, layer):
    module.set_clip_options({"layer": layer})
    ours = module.forward(tokens(20))[0]
    assert torch.equal(ours, Qwen3_4BModel.forward(module, tokens(20))[0])
    assert module.forwards == {f"the states of layer {layer} are wanted": 1}
    module.layer = "hidden"  # the host's reset leaves a list in place


def test_padding_among_the_tokens_is_the_hosts(module, monkeypatch):
    monkeypatch.setitem(module.special_tokens, "pad", 0)  # as the demo's tokenizer has it
    padded = [[5, 6, 0, 7]]
    assert torch.equal(module.forward(padded)[0], Qwen3_4BModel.forward(module, padded)[0])
    assert module.forwards == {"there is padding among the tokens": 1}


def test_other_things_in_the_text_are_the_hosts(module):
    embeds, _, counts, _ = module.process_tokens(tokens(4), CPU)
    assert "holds a image" in qwen.refusal(module, embeds, counts, [{"type": "image", "index": 0, "size": 2}])


def test_training_is_the_hosts(module):
    embeds, _, counts, info = module.process_tokens(tokens(4), CPU)
    with torch.inference_mode(False), torch.enable_grad():
        assert "gradients" in qwen.refusal(module, embeds, counts, info)


def test_norms_that_cannot_be_read_are_the_hosts(module):
    embeds, _, counts, info = module.process_tokens(tokens(4), CPU)
    gain = module.transformer.model.layers[2].self_attn.q_norm
    kept = gain.weight
    gain.weight = torch.nn.Parameter(kept.to(torch.float8_e4m3fn), requires_grad=False)
    refused = qwen.refusal(module, embeds, counts, info)
    gain.weight = kept
    assert "float8" in refused


@pytest.mark.parametrize("part", ["", "self_attn", "mlp", "input_layernorm"])
def test_replaced_and_hooked_layers_are_the_hosts(module, part):
    embeds, _, counts, info = module.process_tokens(tokens(4), CPU)
    changed = module.transformer.model.layers[1].get_submodule(part)
    handle = changed.register_forward_hook(lambda *_: None)
    assert f"a {type(changed).__name__} is replaced or hooked" in qwen.refusal(module, embeds, counts, info)
    handle.remove()
    assert qwen.refusal(module, embeds, counts, info) is None


def test_bf16_products_within_twice_the_hosts_error(module, monkeypatch):
    """What a GPU computes, on the CPU: against fp32, and the host's forward in bf16 is the measure."""
    exact = Qwen3_4BModel.forward(module, tokens(50))[0]
    embeds, mask, counts, _ = module.process_tokens(tokens(50), CPU)
    model = module.transformer.model
    theirs = model(None, mask, embeds.bfloat16(), counts, module.layer_idx, False)[1].float()
    monkeypatch.setattr(module, "compute", torch.bfloat16)
    assert relative_error(module.forward(tokens(50))[0], exact) < 2 * relative_error(theirs, exact)


def test_health_shows_the_path(clip, module):
    states(clip)
    management.load_models_gpu([clip.patcher])
    entries = [entry for entry in health.loaded_models() if entry["model"].startswith("ZImageTEModel")]
    assert {"fast": 1} in [entry["forwards"] for entry in entries]


def test_a_patched_or_replaced_layer_is_seen(clip):
    """A CUDA graph would not run what is hooked to a weight, or stands in place of a forward."""
    layers = clip.cond_stage_model.qwen3_4b.transformer.model.layers
    linear = down_proj(clip)
    count = len(list(layers.parameters()))
    assert len(residency.unchanged_weights([layers])) == count
    linear.weight_function = [lambda weight: weight]
    assert residency.unchanged_weights([layers]) is None
    linear.weight_function, forward = [], linear.forward
    linear.forward = lambda x: x
    assert residency.unchanged_weights([layers]) is None
    linear.forward = forward  # as a bypass LoRA leaves it
    assert len(residency.unchanged_weights([layers])) == count
    del linear.forward
    assert residency.unchanged_weights(clip.cond_stage_model.qwen3_4b.weighted) is not None
    assert residency.resident_weights([layers], CPU) is None


def test_int4_holds_the_projections(packed):
    model = packed.cond_stage_model.qwen3_4b.transformer.model
    for layer in model.layers:
        linears = (*layer.mlp.children(), *(getattr(layer.self_attn, f"{part}_proj") for part in "qkvo"))
        assert all(isinstance(linear.weight, QuantizedTensor) for linear in linears)
        assert not isinstance(layer.input_layernorm.weight, QuantizedTensor)
    assert not isinstance(model.embed_tokens.weight, QuantizedTensor)
    stored = sum(weight.nbytes for weight in packed.cond_stage_model.state_dict().values())
    assert packed.patcher.model_size() == pytest.approx(stored, rel=0.02)


def test_int4_encodes_what_its_weights_say(packed, clip, monkeypatch):
    """As the host's own forward does, without multiplying a weight out; and not far from the whole weights."""
    inner = packed.cond_stage_model.qwen3_4b
    products, multiply = [], int4.linear
    monkeypatch.setattr(int4, "linear", lambda *given: products.append(1) or multiply(*given))
    ours = states(packed)
    assert len(products) == 4 * 7 and inner.forwards[turbo.FAST]
    theirs = Qwen3_4BModel.forward(inner, [[token for token, _ in packed.tokenize("a red circle")["qwen3_4b"][0]]])[0]
    assert relative_error(ours, theirs) < ROUNDING
    assert 1e-3 < relative_error(ours, states(clip)) < 0.15


def test_int4_is_saved_and_loaded_again(packed, folder):
    weights = packed.cond_stage_model.qwen3_4b.transformer.state_dict()
    comfy.utils.save_torch_file(weights, str(folder / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]  # says that what is quantised is to be multiplied out
    (folder / "config.json").write_text(json.dumps(config))
    again = text.load_text_encoder(folder, CPU)
    assert isinstance(down_proj(again).weight, QuantizedTensor)
    assert torch.equal(states(again), states(packed))


def test_int4_is_kept_beside_the_folder(packed, folder, monkeypatch):
    first = text.load_text_encoder(folder, CPU, precision="int4", cache=True)
    assert cache_file.place(folder, "int4") == folder.with_name("text_encoder_int4.safetensors")
    monkeypatch.setattr(quantiser, "quantised", lambda *_: pytest.fail("quantised again"))
    again = text.load_text_encoder(folder, CPU, precision="int4-fp8")
    assert torch.equal(states(again), states(first)) and torch.equal(states(first), states(packed))


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32", "fp8"])
def test_other_precisions_hold_the_text_encoder_as_before(clip, precision):
    other = text.load_text_encoder(FOLDER, CPU, precision=precision)
    assert torch.equal(states(other), states(clip))


@pytest.mark.parametrize("of", ["clip", "packed"])
def test_lora_merges_and_leaves(of, request):
    of = request.getfixturevalue(of)
    before = states(of)
    generator, plain = torch.Generator().manual_seed(5), down_proj(of, 1).weight
    if isinstance(plain, QuantizedTensor):
        plain = plain.dequantize()
    wanted = plain.float() + (change := torch.randn(256, 512, generator=generator) * 0.02)
    changed = of.clone()
    changed.add_patches({PROJECTION.format(1): (change,)}, 1.0)
    assert relative_error(states(changed), before) > 1e-3
    merged = down_proj(of, 1).weight
    merged = merged.dequantize() if isinstance(merged, QuantizedTensor) else merged
    assert relative_error(merged.float(), wanted) < 0.12
    assert torch.equal(states(of), before)


@pytest.mark.parametrize("of", ["clip", "packed"])
def test_bypass_lora_is_not_passed_by(of, request):
    of = request.getfixturevalue(of)
    before, generator = states(of), torch.Generator().manual_seed(6)
    name = "text_encoders." + PROJECTION.format(1).removesuffix(".weight")
    lora = {
        f"{name}.lora_{part}.weight": torch.randn(shape, generator=generator) * 0.1
        for part, shape in (("A", (4, 512)), ("B", (256, 4)))
    }
    _, bypass = comfy.sd.load_bypass_lora_for_models(None, of, lora, 0.0, 1.0)
    assert relative_error(states(bypass), before) > 1e-3
    assert torch.equal(states(of), before)
    remembered, anew, again = (text.encode(clip, "a red circle")[0][0] for clip in (of, bypass, of))
    assert not torch.equal(remembered, anew) and torch.equal(remembered, again)


def test_int4_leaves_a_packed_format_as_it_is(tmp_path):
    """nvfp4 and the like cannot be multiplied out; the text encoder need not be INT4 for the denoiser to be."""
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(catalogue.DEMO_FOLDER / part, tmp_path / part)
    folder, name = tmp_path / "text_encoder", "model.layers.0.mlp.up_proj"
    weights = dict(formats.expanded(Checkpoint.read(folder), torch.bfloat16).weights)
    weight = QuantizedTensor.from_float(weights.pop(f"{name}.weight"), "TensorCoreNVFP4Layout")
    mark = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    weights |= weight.state_dict(f"{name}.weight") | {f"{name}.comfy_quant": mark}
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    clip = text.load_text_encoder(folder, CPU, precision="int4")
    assert relative_error(states(clip), states(text.load_text_encoder(folder, CPU))) < 1e-6


def test_a_deep_clone_is_held_as_its_original(packed):
    clone = packed.patcher.clone(force_deepcopy=True)
    inner = clone.model.qwen3_4b
    assert inner is not packed.cond_stage_model.qwen3_4b and type(inner) is encoder.TurboTextEncoder
    assert isinstance(inner.transformer.model.layers[0].mlp.up_proj.weight, QuantizedTensor)


def test_a_files_floats_are_held_in_what_a_gpu_computes(monkeypatch):
    """fp32 or fp16 in a file would be cast at every product; what belongs to quantised weights keeps its type."""
    checkpoint = Checkpoint.read(FOLDER)
    names = [name for name in checkpoint.weights if not name.endswith((".weight_scale", ".comfy_quant"))]
    kept = text._in_type(checkpoint, torch.float16, names).weights
    assert kept["model.norm.weight"].dtype == torch.float16
    assert kept["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert kept["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float32
    monkeypatch.setattr(qwen, "compute_type", lambda device: torch.bfloat16)
    exact = text.load_text_encoder(FOLDER, CPU, precision="fp32")
    assert exact.cond_stage_model.qwen3_4b.compute == torch.float32
    held = text.load_text_encoder(FOLDER, CPU)
    assert held.cond_stage_model.qwen3_4b.compute == torch.bfloat16
    assert {weight.dtype for weight in held.cond_stage_model.qwen3_4b.transformer.parameters()} == {torch.bfloat16}
