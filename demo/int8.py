"""ComfyUI's `int8_tensorwise` storage of linear weights.

`X.weight` (int8, [rows, columns]) times `X.weight_scale` (float32, [rows, 1]) is the weight;
`X.comfy_quant` (uint8) holds the JSON text that names the format.
"""

import json
import re

import torch

MARKER = torch.tensor(list(json.dumps({"format": "int8_tensorwise"}).encode()), dtype=torch.uint8)
# The blocks' projections; embedders, norms and the final layer stay in bfloat16.
QUANTISED = re.compile(
    r"(layers|noise_refiner|context_refiner)\.\d+\."
    r"(attention|feed_forward|adaLN_modulation|self_attn|mlp)\..*weight"
)


def is_quantised(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and QUANTISED.search(name) is not None


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] → int8 values and float32 scales [rows, 1]; the error is at most half a scale."""
    weight = weight.float()
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
    return (weight / scale).round().to(torch.int8), scale


def pack(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A float state dict → what is stored: int8 where `is_quantised`, bfloat16 elsewhere."""
    stored = {}
    for name, tensor in state.items():
        if is_quantised(name, tensor):
            layer = name.removesuffix(".weight")
            stored[name], stored[f"{layer}.weight_scale"] = quantise(tensor)
            stored[f"{layer}.comfy_quant"] = MARKER.clone()
        else:
            stored[name] = tensor.to(torch.bfloat16)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}


def unpack(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `pack`: a float32 state dict."""
    state = {}
    for name, tensor in stored.items():
        if name.endswith((".weight_scale", ".comfy_quant")):
            continue
        scale = stored.get(f"{name}_scale")
        state[name] = tensor.float() if scale is None else tensor.float() * scale
    return state
