"""The checkpoint's folder: int8 storage, names and size."""

import json

import pytest
import torch
from safetensors import safe_open

from zimage_turbo.demo.checkpoint import PARTS, load_part, load_state, save_part
from zimage_turbo.demo.inherit import narrow_feed_forward
from zimage_turbo.demo.int8 import MARKER, is_quantised, pack, quantise, unpack

LIMIT = 19_000_000


def test_the_rounding_error_is_at_most_half_a_step():
    weight = torch.randn(7, 33) * torch.logspace(-4, 2, 7)[:, None]
    values, scale = quantise(weight)
    assert values.dtype == torch.int8 and scale.shape == (7, 1)
    assert ((values * scale - weight).abs() <= scale * 0.5001).all()


def test_a_row_of_zeros_stays_zero():
    values, scale = quantise(torch.zeros(2, 4))
    assert torch.equal(values * scale, torch.zeros(2, 4))


def test_packing_names_the_format_and_unpacks():
    name = "layers.0.attention.to_q.weight"
    state = {name: torch.randn(8, 8), "layers.0.attention_norm1.weight": torch.ones(8)}
    stored = pack(state)
    assert bytes(stored["layers.0.attention.to_q.comfy_quant"].tolist()) == bytes(MARKER.tolist())
    assert json.loads(bytes(MARKER.tolist())) == {"format": "int8_tensorwise"}
    restored = unpack(stored)
    assert set(restored) == set(state)
    assert torch.allclose(restored[name], state[name], atol=state[name].abs().max() / 250)


@pytest.mark.parametrize("name", list(PARTS))
def test_a_part_survives_being_saved_again(name, pack, tmp_path):
    part = load_part(pack / "demo", name)
    save_part(tmp_path, name, part, part.config)
    _, again = load_state(tmp_path, name)
    for key, value in part.state_dict().items():
        assert torch.allclose(again[key], value, rtol=1e-2, atol=1e-6), key


def test_only_the_blocks_are_quantised(pack):
    for name, (_, file) in PARTS.items():
        with safe_open(pack / "demo" / name / file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118 - not a mapping
                tensor = stored.get_tensor(key)
                if key.endswith(".weight_scale"):
                    assert tensor.dtype == torch.float32 and tensor.shape[1] == 1
                elif not key.endswith(".comfy_quant"):
                    expected = torch.int8 if name != "vae" and is_quantised(key, tensor) else torch.bfloat16
                    assert tensor.dtype == expected, key


def test_pruning_keeps_the_strongest_units():
    w1 = torch.tensor([[1.0], [0.1], [2.0]])
    state = {
        "a.feed_forward.w1.weight": w1,
        "a.feed_forward.w2.weight": torch.ones(1, 3),
        "a.feed_forward.w3.weight": torch.ones(3, 1),
    }
    narrow = narrow_feed_forward(state, 2)
    assert torch.equal(narrow["a.feed_forward.w1.weight"], w1[[0, 2]])
    assert narrow["a.feed_forward.w2.weight"].shape == (1, 2)


def test_the_demo_stays_small(pack):
    files = [path for path in (pack / "demo").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= LIMIT
