"""Our weight formats inside the host: load, compute, LoRA, clone, save, reload, training, refusal by stock layers."""

import shutil
import threading

import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.quant_ops import QuantizedTensor

from zimage_turbo.engine import cache_file, catalogue, forward, model, ode, quantiser, sampling
from zimage_turbo.engine.checkpoint import Checkpoint, CheckpointError
from zimage_turbo.engine.model import load_model
from zimage_turbo.kernels import int4 as int4_kernels
from zimage_turbo.tests.comparison import relative_error, stock_sample
from zimage_turbo.tests.weights import small_transformer

POSITIVE = [[torch.randn(1, 40, 256, generator=torch.Generator().manual_seed(3)), {}]]
LATENT = {"samples": torch.zeros(1, 16, 24, 24)}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return small_transformer(tmp_path_factory.mktemp("weights") / "small.safetensors", layers=2)


@pytest.fixture(scope="module")
def int4(file):
    with torch.inference_mode():  # as the host runs nodes
        return load_model(file, "int4")


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


def test_blocks_are_quantised_and_the_rest_is_not(int4):
    module = int4.model.diffusion_model
    for block in (*module.layers, *module.noise_refiner, *module.context_refiner):
        for linear in (block.attention.qkv, block.attention.out, *block.feed_forward.children()):
            assert isinstance(linear.weight, QuantizedTensor)
    for linear in (module.layers[0].adaLN_modulation[0], module.x_embedder, module.final_layer.linear):
        assert not isinstance(linear.weight, QuantizedTensor)
    assert weight_of(int4).shape == (768, 256)


def test_memory_is_counted_as_stored(int4):
    stored = sum(tensor.nbytes for tensor in int4.model.diffusion_model.state_dict().values())
    assert int4.model_size() == pytest.approx(stored, rel=0.02)


def test_draws_what_its_weights_say(int4, file):
    """The same latent as a 16-bit model whose weights were quantised and multiplied out before."""
    weights = int4.model.diffusion_model.state_dict()
    kept = Checkpoint("kept", {name: value.clone() for name, value in weights.items()}, {}, {})
    path = file.with_name("multiplied_out.safetensors")
    comfy.utils.save_torch_file(model.formats.expanded(kept, torch.float32).weights, str(path))
    assert relative_error(drawn(int4), drawn(load_model(path, "fp32"))) < 1e-3


def test_stock_sampler_takes_it(int4):
    assert relative_error(drawn(int4), stock_sample(int4, POSITIVE, LATENT, 1)) < 1e-3


def test_lora_merges_and_leaves(int4):
    before, weight = drawn(int4), int4.model.diffusion_model.layers[0].attention.out
    plain = weight.weight.dequantize().float()
    merged, _ = comfy.sd.load_lora_for_models(int4, None, lora(), 1.0, 0.0)
    assert len(merged.patches) == 1
    with_lora = drawn(merged)
    pair = list(lora().values())
    wanted = plain + pair[1] @ pair[0]
    assert isinstance(weight.weight, QuantizedTensor)
    nearest = int4_kernels.dequantise(int4_kernels.quantise(wanted), torch.float32)
    assert relative_error(weight.weight.dequantize().float(), wanted) < 2 * relative_error(nearest, wanted)
    assert relative_error(with_lora, before) > 1e-3
    assert torch.equal(drawn(int4), before)


def test_bypass_lora_is_exact(int4, file):
    """A LoRA beside the weight instead of in it: the fast forward must not pass it by."""
    before = drawn(int4)
    bypass, _ = comfy.sd.load_bypass_lora_for_models(int4, None, lora(), 1.0, 0.0)
    assert relative_error(drawn(bypass), before) > 1e-3
    assert torch.equal(drawn(int4), before)
    assert not forward.replaced(int4.model.diffusion_model.layers[0].attention.out)


def test_clone_is_independent_and_equal(int4):
    clone = int4.clone(force_deepcopy=True)
    assert clone.model is not int4.model
    assert torch.equal(drawn(clone), drawn(int4))


def test_saved_and_loaded_again(int4, tmp_path):
    path = tmp_path / "saved.safetensors"
    comfy.utils.save_torch_file(int4.model.diffusion_model.state_dict(), str(path))
    again = load_model(path, "auto")
    assert isinstance(weight_of(again), QuantizedTensor)
    assert torch.equal(drawn(again), drawn(int4))


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
    assert again.get_attachment(model.NATIVE_SIZE) == 256
    assert again.model.latent_format.latent_rgb_factors[0] == [-0.029, -0.109, -0.245]


def test_a_disk_that_takes_no_cache_does_not_stop_the_model(file, tmp_path, caplog):
    source = tmp_path / "model.safetensors"
    source.write_bytes(file.read_bytes())
    cache_file.place(source, "int4").mkdir()
    assert torch.isfinite(drawn(load_model(source, "int4", cache=True))).all()
    assert cache_file.read(source, "int4") is None
    assert "could not be kept" in caplog.text and not list(tmp_path.glob("*.partial"))


def test_a_file_without_groups_is_incomplete(int4, tmp_path):
    weights = int4.model.diffusion_model.state_dict()
    del weights["layers.0.attention.qkv.weight_groups"]
    comfy.utils.save_torch_file(weights, str(tmp_path / "cut.safetensors"))
    with pytest.raises(CheckpointError, match=r"groups of layers\.0\.attention\.qkv"):
        load_model(tmp_path / "cut.safetensors", "auto")


def test_stock_layers_refuse_it(int4):
    """A stock loader that knows our format's name from the registry still cannot read it as something else."""
    prefix = "layers.0.attention.qkv."
    state = {
        name.removeprefix(prefix): value
        for name, value in int4.model.diffusion_model.state_dict().items()
        if name.startswith(prefix)
    }
    stock = comfy.ops.mixed_precision_ops({}, torch.bfloat16).Linear(256, 768, bias=False)
    with pytest.raises(ValueError, match="Unsupported quantization format: zimage_int4"):
        stock.load_state_dict(state)


def test_gradients_pass_through(file):
    patcher = load_model(file, "int4")
    linear = patcher.model.diffusion_model.layers[0].feed_forward.w1
    with torch.inference_mode(False), torch.enable_grad():
        weight = linear.weight.dequantize().clone()
        x = torch.randn(3, 256).requires_grad_()
        (linear(x).square().sum()).backward()
        expected = torch.autograd.grad((x @ weight.float().T).square().sum(), x)[0]
    assert relative_error(x.grad, expected) < 1e-2


@pytest.mark.parametrize("precision", ["fp8", "int4-fp8"])
def test_a_device_without_fp8_says_so(file, precision):
    with pytest.raises(ValueError, match=rf"'{precision}' cannot be used on cpu.*8\.9.*Choose"):
        load_model(file, precision)
