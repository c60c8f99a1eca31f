"""Weight patches that reach another process's model, through the bytes that are sent."""

import comfy.model_management as management
import comfy.sd
import pytest
import torch

from zimage_turbo.engine import ode, patches, sampling
from zimage_turbo.engine.group import wire
from zimage_turbo.engine.model import load_model
from zimage_turbo.tests.weights import small_transformer

POSITIVE = [[torch.randn(1, 40, 256, generator=torch.Generator().manual_seed(3)), {}]]
LATENT = {"samples": torch.zeros(1, 16, 16, 16)}
OUT, QKV = "diffusion_model.layers.0.attention.out", "diffusion_model.layers.0.attention.qkv"


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


FILES = {
    "lora": {f"{OUT}.lora_A.weight": noise(4, 256), f"{OUT}.lora_B.weight": noise(256, 4)},
    "lora with alpha and magnitude": {
        f"{QKV}.lora_A.weight": noise(4, 256), f"{QKV}.lora_B.weight": noise(768, 4),
        f"{QKV}.alpha": torch.tensor(2.0), f"{QKV}.dora_scale": noise(1, 256).abs() + 1,
    },
    "loha": {f"{OUT}.hada_w{part}": noise(*shape) for part, shape in
             (("1_a", (256, 4)), ("1_b", (4, 256)), ("2_a", (256, 4)), ("2_b", (4, 256)))},
    "lokr": {f"{OUT}.lokr_w1": noise(16, 16), f"{OUT}.lokr_w2": noise(16, 16)},
    "oft": {f"{OUT}.oft_blocks": noise(4, 64, 64)},
    "difference": {f"{OUT}.diff": noise(256, 256)},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same file twice, as two processes have it."""
    file = small_transformer(tmp_path_factory.mktemp("weights") / "small.safetensors", layers=1)
    with torch.inference_mode():
        return load_model(file), load_model(file)


def drawn(model) -> torch.Tensor:
    latent = sampling.sample(model, POSITIVE, LATENT, 1, ode.sigmas(2))["samples"]
    management.unload_all_models()
    return latent


def arrived(model) -> dict:
    return wire.unpack(wire.pack(patches.as_tree(model)))


@pytest.mark.parametrize("kind", FILES)
def test_another_model_draws_the_same(models, kind):
    here, there = models
    with_patch, _ = comfy.sd.load_lora_for_models(here, None, FILES[kind], 0.7, 0.0)
    assert with_patch.patches
    copy = patches.patched(there, arrived(with_patch))
    assert copy.patches_uuid == with_patch.patches_uuid and not there.patches
    latent = drawn(with_patch)
    assert torch.equal(drawn(copy), latent)
    assert not torch.equal(drawn(there), latent)


def test_patches_on_patches(models):
    here, there = models
    both, _ = comfy.sd.load_lora_for_models(here, None, FILES["lora"], 0.7, 0.0)
    both, _ = comfy.sd.load_lora_for_models(both, None, FILES["difference"], -0.2, 0.0)
    copy = patches.patched(there, arrived(both))
    assert [len(each) for each in copy.patches.values()] == [2]
    assert torch.equal(drawn(copy), drawn(both))


def test_none(models):
    here, there = models
    copy = patches.patched(there, arrived(here))
    assert copy.patches == {} and torch.equal(drawn(copy), drawn(here))


def test_code_is_refused_with_its_place(models):
    here = models[0].clone()
    key = f"{OUT}.weight"
    here.add_patches({(key, None, lambda weight: weight): ("diff", (noise(256, 256),))})
    with pytest.raises(ValueError, match=rf"the patch of {key} comes with code"):
        patches.as_tree(here)


def test_patches_of_another_model_are_refused(models):
    here = models[0].clone()
    key = f"{OUT}.weight"
    here.add_patches({key: [(noise(256, 256), lambda weight, **_: weight)]})
    with pytest.raises(ValueError, match="patches of another model"):
        patches.as_tree(here)
