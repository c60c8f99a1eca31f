"""Weight files for tests: full-size shapes in kilobytes, and small random models of the same architecture.

torch.save keeps strides, so a matrix of any shape can be a window on one short random vector. The weights are noise:
shapes, names and arithmetic are real, the pictures are not.
"""

import json
from pathlib import Path

import comfy.ops
import comfy.text_encoders.llama as llama
import torch
from comfy.ldm.lumina.model import NextDiT
from safetensors.torch import save_file

FULL = {
    "patch_size": 2, "in_channels": 16, "dim": 3840, "cap_feat_dim": 2560, "n_refiner_layers": 2, "qk_norm": True,
    "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip
SMALL = FULL | {"dim": 256, "cap_feat_dim": 256, "n_heads": 2, "n_kv_heads": 2}
MARKER = torch.tensor(list(json.dumps({"format": "int8_tensorwise"}).encode()), dtype=torch.uint8)
_BLOCK_LINEARS = (".attention.", ".feed_forward.", ".self_attn.", ".mlp.")


class _Windows:
    """Tensors of any shape over one random vector of each type."""

    def __init__(self, length: int, std: float, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.floats = (torch.randn(length, generator=generator) * std).to(torch.bfloat16)
        self.bytes = torch.randint(-127, 128, (length,), generator=generator, dtype=torch.int8)
        self.count = 0

    def take(self, source: torch.Tensor, shape: tuple) -> torch.Tensor:
        self.count += 1
        offset = self.count * 131 % 4096
        reach = offset + sum((size - 1) * stride for size, stride in zip(shape, (1, 3), strict=False))
        strides = (1, 3) if reach < source.numel() else (1, 1)
        return source.as_strided(shape, strides[: len(shape)], offset)


def _strided(module: torch.nn.Module, quantised: bool, length: int, std: float) -> dict[str, torch.Tensor]:
    windows, weights = _Windows(length, std, seed=0), {}
    one, zero = torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    for name, value in sorted(module.state_dict().items()):
        shape = tuple(value.shape)
        if len(shape) == 1:
            is_gain = "norm" in name or name == "cap_embedder.0.weight"
            weights[name] = (one if is_gain and name.endswith("weight") else zero).expand(shape)
        elif quantised and any(part in name for part in _BLOCK_LINEARS):
            layer = name.removesuffix(".weight")
            weights[name] = windows.take(windows.bytes, shape)
            weights[f"{layer}.weight_scale"] = torch.full((1, 1), std / 64).expand(shape[0], 1)
            weights[f"{layer}.comfy_quant"] = MARKER
        else:
            weights[name] = windows.take(windows.floats, shape)
    return weights


def full_size_transformer(path: Path, layers: int, quantised: bool) -> Path:
    """Z-Image of the official width; 30 layers is the real depth. int8 stays shared in memory, bf16 is expanded."""
    module = NextDiT(
        **FULL, n_layers=layers, device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    torch.save(_strided(module, quantised, 1 << 16, 0.02), path)
    return path


def full_size_text_encoder(path: Path) -> Path:
    """Qwen3-4B, all 36 layers, projections in int8."""
    module = llama.Qwen3_4B({}, torch.float32, "meta", comfy.ops.disable_weight_init)
    torch.save(_strided(module, True, 1 << 18, 1.0), path)
    return path


def small_transformer(path: Path, layers: int = 1, seed: int = 0) -> Path:
    """A random Z-Image of width 256 as .safetensors in bf16."""
    module = NextDiT(**SMALL, n_layers=layers, device="cpu", dtype=torch.float32, operations=comfy.ops.manual_cast)
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, value in sorted(module.state_dict().items()):
        gain = "norm" in name and name.endswith("weight")
        weights[name] = torch.ones(value.shape) if gain else torch.randn(value.shape, generator=generator) * 0.05
    save_file({name: value.to(torch.bfloat16) for name, value in weights.items()}, path)
    return path


def random_text_encoder(sizes: dict, device: str) -> dict[str, torch.Tensor]:
    """Weights of a Qwen3-4B in bf16, 8 GB, or of one that differs by `sizes`; some channels loud as in trained models.

    Gains near one, every 320th channel of the states eight times as loud; the same on every call.
    """
    generator, weights = torch.Generator(device).manual_seed(0), {}
    empty = llama.Qwen3_4B(sizes, torch.bfloat16, "meta", comfy.ops.disable_weight_init)
    for name, value in empty.state_dict().items():
        noise = torch.randn(value.shape, device=device, dtype=torch.bfloat16, generator=generator)
        if "norm" in name:
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.02
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                noise[::320] *= 8
        weights[name] = noise
    return weights
