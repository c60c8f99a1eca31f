"""Reading weight files: one file, a sharded folder, diffusers key names, expansion of quantised weights."""

import json
import re
from pathlib import Path

import comfy.utils
import torch

StateDict = dict[str, torch.Tensor]

QUANTISED_EXPANDABLE = ("int8_tensorwise", "float8_e4m3fn", "float8_e5m2")
_QKV = re.compile(r"(.+\.attention)\.to_([qkv])\.(.+)")
_RENAMED = (
    (".attention.to_out.0.", ".attention.out."),
    (".attention.norm_q.", ".attention.q_norm."),
    (".attention.norm_k.", ".attention.k_norm."),
    ("all_x_embedder.2-1.", "x_embedder."),
    ("all_final_layer.2-1.", "final_layer."),
)


class CheckpointError(ValueError):
    """A weight file that cannot be used. The message names the file, what is wrong and the remedy."""


def read(path: Path) -> tuple[StateDict, dict]:
    """Weights and metadata of a file, or of a diffusers component folder with one or more shards.

    Raises CheckpointError when the file is missing, empty, cut off, or not a weight file.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"Weight file '{path.name}' is not there. Put it back or choose another file.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"Weight file '{path.name}' is empty (0 bytes). Download or copy it again.")
    try:
        weights, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    except Exception as error:  # safetensors, zip and unpickling each raise their own kinds
        raise CheckpointError(
            f"Weight file '{path.name}' ({path.stat().st_size:,} bytes) cannot be read: {_first_line(error)}. "
            "It is cut off, corrupt, or not a .safetensors weight file: compare its size with the original's and "
            "download it again."
        ) from error
    if not isinstance(weights, dict) or not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"Weight file '{path.name}' holds no tensors. Choose a model's weight file.")
    return weights, metadata or {}


def read_config(folder: Path) -> dict:
    """The config.json of a diffusers component. Raises CheckpointError when it is missing or not JSON."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"'{folder.parent.name}/{folder.name}/config.json' cannot be read: {_first_line(error)}. "
            "Download the whole diffusers folder again."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"'{folder.parent.name}/{folder.name}/config.json' is not a JSON object.")
    return config


def comfy_names(weights: StateDict) -> StateDict:
    """Diffusers' names of Z-Image's weights turned into ComfyUI's; weights that have them already are returned as is.

    to_q, to_k and to_v [dim, dim] become rows of one qkv [3 dim, dim]; row-wise scales are stacked the same way.
    """
    if "noise_refiner.0.attention.to_q.weight" not in weights:
        return weights
    renamed, split = {}, {}
    for name, tensor in weights.items():
        match = _QKV.fullmatch(name)
        if match:
            split.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = tensor
            continue
        for theirs, ours in _RENAMED:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    for name, parts in split.items():
        renamed[name] = _stack(name, parts)
    return renamed


def expand(weights: StateDict, dtype: torch.dtype, name: str) -> StateDict:
    """Weights in the host's quantised formats multiplied out: weight · scale, rounded to ``dtype``.

    Raises CheckpointError for a format that has no plain product form.
    """
    expanded = dict(weights)
    for marker in [key for key in weights if key.endswith(".comfy_quant")]:
        layer = marker.removesuffix(".comfy_quant")
        settings = json.loads(bytes(weights[marker].tolist()))
        if settings.get("format") not in QUANTISED_EXPANDABLE or settings.get("convrot"):
            raise CheckpointError(
                f"'{name}' is stored as {settings.get('format')}, which cannot be expanded. Set precision to 'auto'."
            )
        scale = expanded.pop(f"{layer}.weight_scale").float()
        expanded[f"{layer}.weight"] = (expanded[f"{layer}.weight"].float() * scale).to(dtype)
        del expanded[marker]
        expanded.pop(f"{layer}.input_scale", None)
    return expanded


def is_quantised(weights: StateDict) -> bool:
    return any(key.endswith(".comfy_quant") for key in weights)


def _read_folder(folder: Path) -> tuple[StateDict, dict]:
    label = f"{folder.parent.name}/{folder.name}"
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        try:
            shards = sorted(set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values()))
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"'{label}/{indexes[0].name}' is not a shard index. Download it again.") from error
        files = [folder / Path(shard).name for shard in shards]
    else:
        files = sorted(folder.glob("*.safetensors"))[:1]
    if not files:
        raise CheckpointError(f"'{label}' holds no .safetensors file. Download the whole diffusers folder.")
    weights, metadata = {}, {}
    for file in files:
        part, metadata = read(file)
        weights |= part
    return weights, metadata


def _stack(name: str, parts: StateDict) -> torch.Tensor:
    if set(parts) != set("qkv"):
        absent = ", ".join(f"to_{part}" for part in "qkv" if part not in parts)
        raise CheckpointError(f"The checkpoint lacks {absent} for '{name}'. Download the file again.")
    tensors = [parts[part] for part in "qkv"]
    if name.endswith(".comfy_quant"):
        return tensors[0]
    if any(tensor.numel() == 1 for tensor in tensors):
        raise CheckpointError(
            f"'{name}' has one scale for the whole matrix, so to_q, to_k and to_v cannot be joined. "
            "Use the single-file version of this checkpoint."
        )
    return torch.cat(tensors)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
