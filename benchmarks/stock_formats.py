"""The diffusion model in the host's own low-bit formats, as its stock loader reads them: INT8 ConvRot and W4A8."""

import json
from pathlib import Path

# by name: the host's layout, what its quantiser is asked for, and the marker beside each weight
FORMATS = {
    "int8": (
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
    ),
    "w4a8": (
        "TensorCoreConvRotW4A4Layout",
        {"linear_dtype": "int8"},
        {"format": "convrot_w4a4", "convrot_groupsize": 256, "linear_dtype": "int8"},
    ),
}


def file_name(form: str) -> str:
    return f"stock_{form}.safetensors"


def write(source: Path, path: Path, form: str) -> None:
    """One file in a format of FORMATS from one in bf16.

    The weights that ours quantises are quantised by the host's library, the others stay as they are.
    """
    import torch
    from comfy.quant_ops import QuantizedTensor, get_layout_class
    from safetensors import safe_open
    from safetensors.torch import save_file

    from ..engine.quantiser import BLOCK_LINEAR

    layout, options, marker = FORMATS[form]
    mark = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {}
    with safe_open(source, framework="pt", device=device) as file:
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            weight = file.get_tensor(name)
            if BLOCK_LINEAR.fullmatch(name):
                codes, params = get_layout_class(layout).quantize(weight, **options)
                made = QuantizedTensor(codes, layout, params).state_dict(name)
                weights |= {key: part.cpu().contiguous() for key, part in made.items()}
                weights[name.removesuffix("weight") + "comfy_quant"] = mark.clone()  # a file holds no tensor twice
            else:
                weights[name] = weight.cpu()
    save_file(weights, path, metadata={"format": "pt"})
