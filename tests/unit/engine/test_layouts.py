"""Our weight formats inside the host: load, compute, LoRA, clone, save, reload, training, refusal by stock layers."""

import shutil
import threading

import comfy.ops
import comfy.sd
import comfy.utils
import comfy_extras.nodes_model_merging as merging
import pytest
import torch
from comfy.quant_ops import QuantizedTensor

from zimage_turbo.engine import cache_file, catalogue, formats, forward, layouts, ode, quantiser, sampling
from zimage_turbo.engine.checkpoint import Checkpoint, CheckpointError
from zimage_turbo.engine.model import NATIVE_SIZE, load_model
from zimage_turbo.engine.operations import operations
from zimage_turbo.tests.comparison import relative_error, stock_sample
from zimage_turbo.tests.weights import small_transformer

POSITIVE = [[torch.randn(1, 40, 256, generator=torch.Generator().manual_seed(3)), {}]]
LATENT = {"samples": torch.zeros(1, 16, 24, 24)}
CPU = torch.device("cpu")
FORMS = {"int4": layouts.INT4, "fp8": layouts.FP8}
ROUNDING = 2e-6  # of fp32 in one product


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return small_transformer(tmp_path_factory.mktemp("weights") / "small.safetensors", layers=2)


@pytest.fixture(scope="module")
def int4(file):
    with torch.inference_mode():  # as the host runs nodes
        return load_model(file, "int4")


@pytest.fixture(scope="module", params=FORMS)
def stored(request, file):
    """A file in each form. The processor refuses to be asked for 'fp8', but reads what holds it."""
    path = file.with_name(f"stored_{request.param}.safetensors")
    comfy.utils.save_torch_file(quantiser.quantised(Checkpoint.read(file), request.param, CPU).weights, str(path))
    return path


@pytest.fixture(scope="module")
def ours(stored):
    with torch.inference_mode():
        return load_model(stored, "auto")


def weight_of(patcher, layer: int = 0) -> torch.Tensor:
    return patcher.model.diffusion_model.layers[layer].attention.qkv.weight


def drawn(patcher) -> torch.Tensor:
    return sampling.sample(patcher, POSITIVE, LATENT, 1, ode.sigmas())["samples"]


def lora(rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        f"diffusion_model.layers.0.attention.out.lora_{part}.weight": torch.randn(shape, generator=generator) * 0.1
        for part, shape in (("A", (rank, 256)), ("B", (256, rank)))
    }


def edited(patcher) -> torch.nn.Module:
    """The layer that `lora` is for."""
    return patcher.model.diffusion_model.layers[0].attention.out


def lora_change() -> torch.Tensor:
    down, up = lora().values()
    return up @ down


def multiplied_out(patcher, path, change: torch.Tensor | None = None):
    """A model in fp32 with the values that a quantised one's weights stand for, and a change to the `edited` one."""
    state = {name: value.clone() for name, value in patcher.model.diffusion_model.state_dict().items()}
    weights = dict(formats.expanded(Checkpoint("kept", state, {}, {}), torch.float32).weights)
    if change is not None:
        weights["layers.0.attention.out.weight"] += change
    comfy.utils.save_torch_file(weights, str(path))
    return load_model(path, "fp32")


def test_blocks_are_quantised_and_the_rest_is_not(ours, stored):
    module, form = ours.model.diffusion_model, FORMS[stored.stem.removeprefix("stored_")]
    for block in (*module.layers, *module.noise_refiner, *module.context_refiner):
        for linear in (block.attention.qkv, block.attention.out, *block.feed_forward.children()):
            assert isinstance(linear.weight, QuantizedTensor) and linear.quant_format == form
    for linear in (module.layers[0].adaLN_modulation[0], module.x_embedder, module.final_layer.linear):
        assert not isinstance(linear.weight, QuantizedTensor)
    assert weight_of(ours).shape == (768, 256)


def test_memory_is_counted_as_stored(ours):
    stored = sum(tensor.nbytes for tensor in ours.model.diffusion_model.state_dict().values())
    assert ours.model_size() == pytest.approx(stored, rel=0.02)


def test_draws_what_its_weights_say(ours, tmp_path):
    """The same latent as a 16-bit model whose weights were quantised and multiplied out before."""
    assert relative_error(drawn(ours), drawn(multiplied_out(ours, tmp_path / "plain.safetensors"))) < 1e-3


def test_stock_sampler_takes_it(ours):
    assert relative_error(drawn(ours), stock_sample(ours, POSITIVE, LATENT, 1)) < 1e-3


def test_lora_merges_and_leaves(ours):
    before, layer = drawn(ours), edited(ours)
    wanted = layer.weight.dequantize().float() + lora_change()
    merged, _ = comfy.sd.load_lora_for_models(ours, None, lora(), 1.0, 0.0)
    assert len(merged.patches) == 1
    with_lora = drawn(merged)
    assert isinstance(layer.weight, QuantizedTensor)
    nearest = QuantizedTensor.from_float(wanted, layer.weight._layout_cls).dequantize()
    assert relative_error(layer.weight.dequantize().float(), wanted) < 2 * relative_error(nearest, wanted)
    assert relative_error(with_lora, before) > 1e-3
    assert torch.equal(drawn(ours), before)


def test_bypass_lora_is_exact(ours, tmp_path):
    """A LoRA beside the weight instead of in it, W x + B A x: the fast forward must not pass it by."""
    before, layer, x = drawn(ours), edited(ours), torch.randn(3, 7, 256)
    wanted = x @ (layer.weight.dequantize().float() + lora_change()).T
    bypass, _ = comfy.sd.load_bypass_lora_for_models(ours, None, lora(), 1.0, 0.0)
    bypass.inject_model()
    with_lora = layer(x)
    bypass.eject_model()
    assert relative_error(with_lora, wanted) < ROUNDING
    exact = drawn(multiplied_out(ours, tmp_path / "edited.safetensors", lora_change()))
    assert relative_error(drawn(bypass), exact) < 1e-3 < relative_error(exact, before) / 10
    assert torch.equal(drawn(ours), before)
    assert not forward.replaced(layer)


@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "with LoRA"])
def test_offloaded_layers_compute_what_they_hold(ours, with_lora):
    """As the host has layers of a model that does not fit: weights come along, and a LoRA is added to them exactly."""
    before, layer, x = drawn(ours), edited(ours), torch.randn(3, 7, 256)
    wanted = x @ (layer.weight.dequantize().float() + (lora_change() if with_lora else 0)).T
    patcher = comfy.sd.load_lora_for_models(ours, None, lora(), 1.0, 0.0)[0] if with_lora else ours.clone()
    ours.unpatch_model(CPU)
    patcher.load(CPU, lowvram_model_memory=1)
    assert patcher.model.model_lowvram and layer.comfy_cast_weights and len(layer.weight_function) == with_lora
    offloaded = layer(x)
    patcher.unpatch_model(CPU)
    assert relative_error(offloaded, wanted) < ROUNDING
    assert isinstance(layer.weight, QuantizedTensor) and not layer.weight_function
    assert torch.equal(drawn(ours), before)


def test_clone_is_independent_and_equal(ours):
    clone = ours.clone(force_deepcopy=True)
    assert clone.model is not ours.model
    assert weight_of(clone).data_ptr() != weight_of(ours).data_ptr()
    assert torch.equal(drawn(clone), drawn(ours))


def test_saved_and_loaded_again(ours, tmp_path):
    path = tmp_path / "saved.safetensors"
    comfy.utils.save_torch_file(ours.model.diffusion_model.state_dict(), str(path))
    again = load_model(path, "auto")
    assert isinstance(weight_of(again), QuantizedTensor)
    assert torch.equal(drawn(again), drawn(ours))


@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "with LoRA"])
def test_the_save_node_keeps_the_form(ours, tmp_path, with_lora):
    patcher = comfy.sd.load_lora_for_models(ours, None, lora(), 1.0, 0.0)[0] if with_lora else ours
    node = merging.ModelSave()
    node.output_dir = str(tmp_path)
    node.save(patcher, "saved", prompt={}, extra_pnginfo={"workflow": {}})
    again = load_model(next(tmp_path.glob("saved*.safetensors")), "auto")
    assert edited(again).quant_format == edited(ours).quant_format
    assert torch.equal(drawn(again), drawn(patcher))


def test_cached_beside_the_file_and_read_from_there(file, tmp_path, monkeypatch):
    source = tmp_path / "model.safetensors"
    source.write_bytes(file.read_bytes())
    first = load_model(source, "int4", cache=True)
    assert cache_file.place(source, "int4") == tmp_path / "model_int4.safetensors"
    monkeypatch.setattr(quantiser, "quantised", lambda *_: pytest.fail("quantised again"))
    assert torch.equal(drawn(load_model(source, "int4")), drawn(first))


def test_a_model_is_there_before_its_file_which_the_next_load_awaits(file, tmp_path, monkeypatch):
    source = tmp_path / "model.safetensors"
    source.write_bytes(file.read_bytes())
    may_write, save = threading.Event(), cache_file.save_file

    def slowly(*arguments, **options):
        assert may_write.wait(60)
        save(*arguments, **options)

    monkeypatch.setattr(cache_file, "save_file", slowly)
    first = drawn(load_model(source, "int4", cache=True))
    assert not cache_file.place(source, "int4").exists()
    monkeypatch.setattr(quantiser, "quantised", lambda *_: pytest.fail("quantised again"))
    threading.Timer(0.2, may_write.set).start()
    assert torch.equal(drawn(load_model(source, "int4")), first)


@pytest.mark.parametrize("precision", ["int4", "auto"])
def test_what_is_int4_is_not_quantised_again(file, tmp_path, monkeypatch, precision):
    first, saved = load_model(file, "int4"), tmp_path / "saved.safetensors"
    comfy.utils.save_torch_file(first.model.diffusion_model.state_dict(), str(saved))
    monkeypatch.setattr(quantiser, "quantised", lambda *_: pytest.fail("quantised again"))
    assert torch.equal(drawn(load_model(saved, precision, cache=True)), drawn(first))
    assert not cache_file.place(saved, "int4").exists()


def test_cache_of_an_older_file_is_not_taken(file, tmp_path):
    source = tmp_path / "model.safetensors"
    source.write_bytes(file.read_bytes())
    load_model(source, "int4", cache=True)
    small_transformer(source, layers=2, seed=5)
    assert cache_file.read(source, "int4") is None


def test_cache_of_a_folder_keeps_its_settings(tmp_path):
    folder = tmp_path / "transformer"
    shutil.copytree(catalogue.DEMO_FOLDER / "transformer", folder)
    load_model(folder, "int4", cache=True)
    again = load_model(folder, "int4")
    assert isinstance(weight_of(again), QuantizedTensor)
    assert again.get_attachment(NATIVE_SIZE) == 256
    assert again.model.latent_format.latent_rgb_factors[0] == [-0.029, -0.109, -0.245]


def test_a_disk_that_takes_no_cache_does_not_stop_the_model(file, tmp_path, caplog):
    source = tmp_path / "model.safetensors"
    source.write_bytes(file.read_bytes())
    cache_file.place(source, "int4").mkdir()
    assert torch.isfinite(drawn(load_model(source, "int4", cache=True))).all()
    assert cache_file.read(source, "int4") is None
    assert "could not be kept" in caplog.text and not list(tmp_path.glob("*.partial"))


def test_a_fault_of_the_writer_is_told_and_stops_nobody(file, tmp_path, caplog, monkeypatch):
    def faulty(*_, **options):
        raise RuntimeError("some tensors share memory")

    source = tmp_path / "model.safetensors"
    source.write_bytes(file.read_bytes())
    monkeypatch.setattr(cache_file, "save_file", faulty)
    load_model(source, "int4", cache=True)
    assert cache_file.read(source, "int4") is None
    assert "could not be written" in caplog.text and "some tensors share memory" in caplog.text


def test_a_file_without_groups_is_incomplete(int4, tmp_path):
    weights = int4.model.diffusion_model.state_dict()
    del weights["layers.0.attention.qkv.weight_groups"]
    comfy.utils.save_torch_file(weights, str(tmp_path / "cut.safetensors"))
    with pytest.raises(CheckpointError, match=r"groups of layers\.0\.attention\.qkv"):
        load_model(tmp_path / "cut.safetensors", "auto")


def test_stock_layers_refuse_it(ours):
    """A stock loader that knows our format's name from the registry still cannot read it as something else."""
    prefix = "layers.0.attention.qkv."
    state = {
        name.removeprefix(prefix): value
        for name, value in ours.model.diffusion_model.state_dict().items()
        if name.startswith(prefix)
    }
    stock = comfy.ops.mixed_precision_ops({}, torch.bfloat16).Linear(256, 768, bias=False)
    with pytest.raises(ValueError, match=r"Z-Image-Turbo's (INT4|FP8) form.*'Z-Image-Turbo Loader'"):
        stock.load_state_dict(state)


@pytest.mark.parametrize("shape", [(3, 256), (2, 5, 256)], ids=["rows", "batch of rows"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_through(form, bias, shape):
    with torch.inference_mode(False), torch.enable_grad():
        state = quantiser.parts("layer.weight", torch.randn(96, 256), FORMS[form])
        if bias:
            state["layer.bias"] = torch.randn(96)
        linear = operations(torch.float32, layouts.COMPUTE_16).Linear(256, 96, bias=bias)
        linear.load_state_dict({name.removeprefix("layer."): value for name, value in state.items()})
        weight, x = linear.weight.dequantize(), torch.randn(shape).requires_grad_()
        result, expected = linear(x), torch.nn.functional.linear(x, weight, linear.bias)
        assert relative_error(result.detach(), expected.detach()) < ROUNDING
        wanted = [x, linear.bias] if bias else [x]
        for ours, theirs in zip(
            torch.autograd.grad(result.square().sum(), wanted),
            torch.autograd.grad(expected.square().sum(), wanted),
            strict=True,
        ):
            assert relative_error(ours, theirs) < ROUNDING


@pytest.mark.parametrize("precision", ["fp8", "int4-fp8"])
def test_a_device_without_fp8_says_so(file, precision):
    with pytest.raises(ValueError, match=rf"'{precision}' cannot be used on cpu.*8\.9.*Choose"):
        load_model(file, precision)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("layout", [layouts.Int4Layout, layouts.Fp8Layout])
def test_some_outputs_of_a_weight_are_those_of_the_whole(layout, rotated):
    layouts.register()
    plain = torch.randn(48, 256)
    options = {"rotated": rotated} if layout is layouts.Int4Layout else {}
    data, params = layout.quantize(plain, **options)
    weight = layouts.QuantizedTensor(data, layout.__name__, params)
    some = layouts.outputs(weight, slice(16, 40))
    assert some.shape == (24, 256) and some._qdata.data_ptr() == data[16:].data_ptr()
    assert torch.equal(some.dequantize(), weight.dequantize()[16:40])
    x = torch.randn(5, 256)
    assert torch.allclose(layouts.multiply(x, some), layouts.multiply(x, weight)[:, 16:40], atol=1e-5)
    assert torch.equal(layouts.outputs(plain, slice(16, 40)), plain[16:40])
