"""Quantised models that do not fit on the GPU: with weights in main memory they draw what the resident ones draw."""

import comfy.model_management as management
import comfy.sd
import comfy.utils
import pytest
import torch

from zimage_turbo.engine import formats, ode, quantiser, sampling, turbo
from zimage_turbo.engine.checkpoint import Checkpoint
from zimage_turbo.engine.model import load_model
from zimage_turbo.tests.comparison import relative_error
from zimage_turbo.tests.weights import small_transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
PRECISIONS = ["int4", "int4-fp8", "fp8"]
POSITIVE = [[torch.randn(1, 40, 256, generator=torch.Generator().manual_seed(3)), {}]]
LAYER = "layers.0.attention.out.weight"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return small_transformer(tmp_path_factory.mktemp("weights") / "small.safetensors", layers=2)


def draw(patcher) -> torch.Tensor:
    latent = sampling.empty_latent(patcher, 256, 256, 1)
    return sampling.sample(patcher, POSITIVE, latent, 1, ode.sigmas())["samples"].float().cpu()


def lora_pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return tuple(torch.randn(shape, generator=generator) * 0.1 for shape in ((4, 256), (256, 4)))


def loaded(file, precision: str, with_lora: bool):
    """On the plain patcher, which moves weights by the layer; the dynamic one maps them in where they are used."""
    patcher = load_model(file, precision, disable_dynamic=True)
    if not with_lora:
        return patcher
    layer, pair = LAYER.removesuffix(".weight"), lora_pair()
    lora = {f"diffusion_model.{layer}.lora_{part}.weight": one for part, one in zip("AB", pair, strict=True)}
    return comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0.0)[0]


def exact(file, precision: str, with_lora: bool, path) -> torch.Tensor:
    """What the quantised weights stand for, with the LoRA's change, drawn in fp32."""
    kept = quantiser.quantised(Checkpoint.read(file), precision, torch.device("cuda"))
    weights = dict(formats.expanded(kept, torch.float32).weights)
    if with_lora:
        down, up = lora_pair()
        weights[LAYER] = weights[LAYER] + up @ down
    comfy.utils.save_torch_file(weights, str(path))
    return draw(load_model(path, "fp32"))


def leave_room_for(size: float, monkeypatch) -> None:
    """Have the host find as much free memory on the GPU as it keeps for work, and `size` bytes for weights.

    It also keeps a buffer of three layers that come along.
    """
    management.unload_all_models()
    free = management.minimum_inference_memory() + size
    monkeypatch.setattr(
        management, "get_free_memory", lambda _=None, torch_free_too=False: (free, 0) if torch_free_too else free
    )


@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "with LoRA"])
@pytest.mark.parametrize("share", [0.8, 0.0], ids=["part of it", "all of it"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_offloaded_draws_what_the_resident_draws(file, precision, share, with_lora, tmp_path, monkeypatch):
    """INT4 in 16 bit is the same to the bit, until the layers of modulation are offloaded: those are then multiplied
    one by one, in sums of another order. A LoRA is added to offloaded weights exactly, to resident ones rounded.

    In FP8, offloaded layers round their rows one by one instead of in the kernel before them: both are as near to
    the exact values, up to a fifth.
    """
    patcher = loaded(file, precision, with_lora)
    truth, resident = exact(file, precision, with_lora, tmp_path / "exact.safetensors"), draw(patcher)
    assert patcher.loaded_size() == patcher.model_size()

    leave_room_for(share * patcher.model_size(), monkeypatch)
    module = patcher.model.diffusion_model
    module.forwards.clear()
    offloaded = draw(patcher)
    assert patcher.model.model_lowvram and patcher.loaded_size() < patcher.model_size()
    places = {layer.weight._qdata.device.type for layer in module.modules() if hasattr(layer, "quant_format")}
    assert places == ({"cpu", "cuda"} if share else {"cpu"})
    assert dict(module.forwards) == {turbo.FAST: 8}
    assert relative_error(offloaded, truth) <= 1.2 * relative_error(resident, truth)
    if precision == "int4" and share and not with_lora:
        assert torch.equal(offloaded, resident)
