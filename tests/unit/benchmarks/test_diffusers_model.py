"""The rival from diffusers computes what the host computes, with the same weights under other names."""

import importlib.util

import comfy.ops
import comfy.utils
import pytest
import torch
from comfy.ldm.lumina.model import NextDiT

from zimage_turbo.benchmarks import diffusers_model
from zimage_turbo.tests.weights import FULL

# wide enough that diffusers, which fixes the width of the time's first layer, has the host's shapes
WIDE = {"dim": 1152, "n_heads": 9, "n_kv_heads": 9, "cap_feat_dim": 64}


def host(layers: int, device: str, **sizes) -> NextDiT:
    config = FULL | sizes
    return NextDiT(**config, n_layers=layers, device=device, dtype=torch.float32, operations=comfy.ops.manual_cast)


def test_names_are_those_that_the_host_reads_from_diffusers_files():
    weights = host(2, "meta").state_dict()
    known = comfy.utils.z_image_to_diffusers({"n_layers": 2, "n_refiner_layers": 2, "dim": FULL["dim"]})
    renamed = dict(diffusers_model.renamed(weights.items()))
    assert set(renamed) <= set(known)
    for name, weight in renamed.items():
        source = known[name]
        whole, (axis, start, length) = source if isinstance(source, tuple) else (source, (0, 0, weight.shape[0]))
        assert weight.shape == weights[whole].narrow(axis, start, length).shape
    assert sum(weight.numel() for weight in renamed.values()) == sum(weight.numel() for weight in weights.values())


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
@pytest.mark.parametrize("batch, height, width, words", [(1, 24, 20, 33), (2, 16, 18, 32)])
def test_same_result(batch, height, width, words):
    generator = torch.Generator().manual_seed(batch)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    module = host(1, "cpu", **WIDE)
    gains = ("norm", "cap_embedder.0")
    module.load_state_dict(
        {
            name: 1 + 0.1 * noise(*value.shape) if any(gain in name for gain in gains) else 0.05 * noise(*value.shape)
            for name, value in module.state_dict().items()
        }
    )
    rival = diffusers_model.build(module.state_dict().items(), n_layers=1, **WIDE)
    x, context = noise(batch, 16, height, width), noise(batch, words, WIDE["cap_feat_dim"])
    times = torch.rand(batch, generator=generator)
    with torch.inference_mode():
        expected = NextDiT._forward(module, x, times, context, words)
        found = diffusers_model.forward(rival, x, times, context)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
