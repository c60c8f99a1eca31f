"""The fast VAE decode against the host's own, on the same module: the same numbers up to rounding."""

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder
from safetensors.torch import load, save

from zimage_turbo.engine import catalogue, decoder, vae
from zimage_turbo.tests.comparison import relative_error

WIDTHS = {"one level": [64], "demo": [32, 64, 128, 128], "three a group": [32, 96, 96]}
SIZES = [(1, 8, 8), (2, 9, 7), (1, 1, 5)]


def module_of(widths: list[int], seed: int = 0) -> decoder.FastDecoder:
    """Random weights that keep the variance; biases and gains large enough to be missed."""
    with torch.inference_mode(False):
        module = Decoder(**vae._side(widths, layers=2))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.state_dict().items():
        weight.copy_(torch.randn(weight.shape, generator=generator))
        weight.mul_(weight[0].numel() ** -0.5 if weight.ndim == 4 else 0.3)
        if weight.ndim == 1 and "norm" in name and name.endswith("weight"):
            weight.add_(1)
    decoder.adopt(module)
    return module.eval()


def latent(*shape: int) -> torch.Tensor:
    return torch.randn(shape[0], 16, *shape[1:], generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def small() -> decoder.FastDecoder:
    return module_of(WIDTHS["demo"])


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_host(widths, size):
    module, z = module_of(widths), latent(*size)
    before = z.clone()
    ours, theirs = decoder.decode(module, z), Decoder.forward(module, z)
    assert ours.shape == theirs.shape and ours.is_contiguous()
    assert relative_error(ours, theirs) < 2e-5
    assert torch.equal(z, before)


def test_bf16_is_as_exact_as_the_host(small):
    small.bfloat16()
    z = latent(1, 9, 7).bfloat16()
    ours, theirs = decoder.decode(small, z), Decoder.forward(small, z)
    exact = Decoder.forward(small.float(), z.float())
    own_error = relative_error(theirs.float(), exact)
    assert ours.dtype == torch.bfloat16 and own_error > 1e-3
    assert relative_error(ours.float(), exact) <= 2 * own_error


def test_tanh_at_the_end(small):
    small.tanh_out, z = True, latent(1, 8, 8)
    assert relative_error(decoder.decode(small, z), Decoder.forward(small, z)) < 2e-5


def test_without_a_gpu_the_host_decodes(small):
    z = latent(1, 8, 8)
    assert torch.equal(small(z), Decoder.forward(small, z))
    assert dict(small.forwards) == {"it runs on cpu": 1}


def test_patched_weights_are_used(small):
    """As hooks of the host patch them while they are cast: a norm, both convolutions of a block, a shortcut."""
    block = small.up[1].block[0]
    for layer in (block.norm1, block.norm2, block.conv1, block.conv2, block.nin_shortcut, small.mid.attn_1.proj_out):
        layer.weight_function = [lambda weight: weight * 1.5]
        layer.bias_function = [lambda bias: bias - 0.5]
    z = latent(1, 8, 8)
    theirs = Decoder.forward(small, z)
    assert relative_error(theirs, Decoder.forward(module_of(WIDTHS["demo"]), z)) > 0.1
    assert relative_error(decoder.decode(small, z), theirs) < 2e-5


def test_weights_of_another_type_are_cast(small):
    small.half()
    for layer in small.modules():
        if hasattr(layer, "comfy_cast_weights"):
            layer.comfy_cast_weights = True
    z = latent(1, 8, 8)
    assert relative_error(decoder.decode(small, z), Decoder.forward(small, z)) < 2e-5


def test_replaced_forwards_are_called(small):
    """A bypass LoRA puts its own forward on a layer, here one that gives another layout too."""
    layers = (small.up[2].block[1].conv1, small.up[2].block[1].conv2, small.mid.attn_1.q, small.conv_in)
    for layer in layers:
        layer.forward = lambda x, own=layer.forward: (own(x) * 1.5).contiguous()
    z = latent(1, 8, 8)
    theirs = Decoder.forward(small, z)
    assert relative_error(theirs, Decoder.forward(module_of(WIDTHS["demo"]), z)) > 0.1
    assert relative_error(decoder.decode(small, z), theirs) < 2e-5
    norm = small.norm_out
    norm.forward = lambda x, own=norm.forward: own(x)
    assert decoder.refusal(small, z, {}) == "the forward of a norm is replaced"


@pytest.mark.parametrize(
    ("z", "arguments", "reason"),
    [
        (torch.zeros(1, 16, 8, 8), {"transformer_options": {}}, "transformer_options"),
        (torch.zeros(1, 16, 1, 8, 8), {}, r"latent is \[1, 16, 1, 8, 8\]"),
        (torch.zeros(1, 16, 8, 8).double(), {}, "float64"),
        (torch.zeros(1, 16, 8, 8), {}, "runs on cpu"),
    ],
)
def test_refusals_have_a_reason(small, z, arguments, reason):
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(decoder.refusal(small, z, arguments))


def test_gradients_are_left_to_the_host(small):
    with torch.inference_mode(False):
        assert decoder.refusal(small, torch.zeros(1, 16, 8, 8), {}) == "gradients are wanted"


def test_an_interrupted_prompt_stops(small):
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        decoder.decode(small, latent(1, 8, 8))
    assert not comfy.model_management.processing_interrupted()


def test_laid_out_weights_are_saved_as_ever(small):
    """Names, values and contiguity of a state dict stay; the weights themselves lie in channels_last memory."""
    before = {f"decoder.{name}": weight.clone() for name, weight in small.state_dict().items()}
    z = latent(1, 8, 8)
    theirs = Decoder.forward(small, z)
    whole = torch.nn.ModuleDict({"decoder": small, "other": torch.nn.Conv2d(4, 4, 3)})
    decoder.lay_out(small)
    assert not small.conv_in.weight.is_contiguous()
    after = load(save(whole.state_dict()))
    assert set(after) == set(before) | {"other.weight", "other.bias"}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert relative_error(decoder.decode(small, z), theirs) < 2e-5
    small.load_state_dict({name: torch.zeros_like(weight) for name, weight in small.state_dict().items()})
    assert not decoder.decode(small, z).any()


@pytest.fixture
def demo_vae(monkeypatch) -> comfy.sd.VAE:
    """The demo's, loaded as if this were a GPU with room for it."""
    monkeypatch.setattr(decoder, "device_refusal", lambda device: None)
    monkeypatch.setattr(vae, "fits", lambda *_: True)
    return vae.load_vae(catalogue.DEMO_FOLDER / "vae")


def host_decode(ours: comfy.sd.VAE, monkeypatch, method: str, *arguments) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(decoder.FastDecoder, "forward", Decoder.forward)
        return getattr(ours, method)(*arguments)


@pytest.mark.parametrize(
    ("method", "arguments"), [("decode", ()), ("decode_tiled", (16, 16, 4))], ids=["whole", "tiled"]
)
def test_the_vae_decodes(demo_vae, monkeypatch, method, arguments):
    z = latent(2, 24, 20)
    module = demo_vae.first_stage_model.decoder
    ours = getattr(demo_vae, method)(z, *arguments)
    assert set(module.forwards) == {decoder.FAST}
    theirs = host_decode(demo_vae, monkeypatch, method, z, *arguments)
    assert ours.shape == (2, 192, 160, 3)
    assert (ours - theirs).abs().max() < 1e-4


def test_a_dynamic_patcher_is_replaced(demo_vae, monkeypatch):
    """The host's dynamic one, which a process without a GPU has not, leaves weights in the file's type."""
    dynamic = type("Dynamic", (comfy.model_patcher.ModelPatcher,), {"is_dynamic": lambda self: True})
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", dynamic)
    z = latent(1, 16, 16)
    made = vae.load_vae(catalogue.DEMO_FOLDER / "vae")
    assert type(made.patcher) is comfy.model_patcher.ModelPatcher and made.patcher.cached_patcher_init
    assert {weight.dtype for weight in made.first_stage_model.parameters()} == {made.vae_dtype}
    assert torch.equal(made.decode(z), demo_vae.decode(z))
    monkeypatch.setattr(vae, "fits", lambda *_: False)
    assert type(vae.load_vae(catalogue.DEMO_FOLDER / "vae").patcher) is dynamic


def test_memory_is_counted_from_the_widths(demo_vae):
    """It grows with the pixels and the bytes of a value; at full size and 1024x1024, as little as 8 GiB leave it."""
    used = demo_vae.memory_used_decode
    small, large = (used((1, 16, side, side), torch.bfloat16) for side in (512, 1024))
    assert large == 4 * small > decoder.ATTENTION_MEMORY
    assert used((1, 16, 512, 512), torch.float32) == 2 * small
    assert used((1, 16, 8, 8), torch.bfloat16) == decoder.ATTENTION_MEMORY
    with torch.device("meta"):
        full = Decoder(**vae._side(vae.FULL_CHANNELS, layers=2))
    assert decoder.memory_used(full)((1, 16, 128, 128), torch.bfloat16) < 1.2 * 2**30
