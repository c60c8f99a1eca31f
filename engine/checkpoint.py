"""A model's weights as they lie on disk: one file, or a diffusers component folder with its config.json."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import comfy.utils
import torch

StateDict = dict[str, torch.Tensor]

# What a browser or git leaves in place of a weight file, by how it begins.
_IMPOSTORS = {
    b"version https://git-lfs": "it is a Git LFS pointer instead of the file that it stands for",
    b"<": "it is a web page",
}


class CheckpointError(ValueError):
    """A weight file that cannot be used. The message names the file, what is wrong and the remedy."""

    __module__ = "builtins"  # the host shows users an error's full type name, which would hold the pack's path


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """``label`` names it in messages; ``config`` is empty for a single file."""

    label: str
    weights: StateDict
    metadata: dict[str, str]
    config: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Raises CheckpointError when a file is missing, empty, cut off, or not what its name says."""
        if path.is_dir():
            label = f"{path.parent.name}/{path.name}"
            weights, metadata = _read_folder(path, label)
            return cls(label, weights, metadata, _read_config(path / "config.json", label))
        return cls(path.name, *_read_file(path, path.name), {})

    def replaced(self, weights: StateDict, metadata: dict[str, str] | None = None) -> "Checkpoint":
        return dataclasses.replace(self, weights=weights, metadata=self.metadata if metadata is None else metadata)

    def configured(self, folder: Path) -> "Checkpoint":
        """With the config.json of a component folder. Raises CheckpointError."""
        return dataclasses.replace(self, config=_read_config(folder / "config.json", self.label))

    def error(self, what: str) -> CheckpointError:
        """``what`` goes on from the checkpoint's name: 'lacks …', 'is not …'."""
        return CheckpointError(f"'{self.label}' {what}")

    def setting(self, name: str, kind: type, default: Any = None) -> Any:
        """A value of config.json; ``default`` where it is absent or null. Raises CheckpointError for another type."""
        value = self.config.get(name)
        if value is None:
            value = default
        if not isinstance(value, kind):
            found = "is missing" if value is None else f"is {value!r}, not of type {kind.__name__}"
            raise CheckpointError(f"'{self.label}/config.json': {name} {found}. Download the folder again.")
        return value

    def require(self, shapes: dict[str, torch.Size]) -> None:
        """Raises CheckpointError unless every weight is there in its shape; quantised ones may hold two in a byte."""
        missing = [name for name in shapes if name not in self.weights]
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise self.error(f"lacks weights: {shown}. It is incomplete: download it again.")
        for name, shape in shapes.items():
            found = self.weights[name].shape
            packed = f"{name.removesuffix('.weight')}.comfy_quant" in self.weights and (shape[0], shape[1] // 2)
            if found not in (shape, packed):
                raise self.misfit(name, found, shape)

    def misfit(self, name: str, found: torch.Size, expected: torch.Size) -> CheckpointError:
        return self.error(
            f"does not fit: {name} has the shape {list(found)}, expected is {list(expected)}. "
            "It is damaged or belongs to another model: download it again."
        )


def shapes_of(module: torch.nn.Module, prefix: str = "") -> dict[str, torch.Size]:
    """Names and shapes of a module's weights; one on the meta device costs no memory."""
    return {prefix + name: value.shape for name, value in module.state_dict().items()}


def _read_file(path: Path, label: str) -> tuple[StateDict, dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"'{label}' is not there. Put it back or choose another file.")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"'{label}' is empty (0 bytes). Download or copy it again.")
    try:
        weights, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    except MemoryError:
        raise
    except Exception as error:  # safetensors, zip and torch each raise their own kinds
        system = next((cause for cause in (error, error.__context__) if isinstance(cause, OSError)), None)
        if system is not None:
            raise CheckpointError(
                f"'{label}' could not be read: {system.strerror}. Check its rights and free memory."
            ) from error
        reason = _impostor(path) or _first_line(error)
        if isinstance(error, pickle.UnpicklingError) and _impostor(path) is None:
            raise CheckpointError(
                f"'{label}' cannot be read: it holds Python code or nonsense, not plain weights, and is not run. "
                "Use its .safetensors version."
            ) from error
        raise CheckpointError(
            f"'{label}' ({size:,} bytes) cannot be read: {reason}. It is cut off, corrupt or no weight file: "
            "compare its size with the original's and download it again."
        ) from error
    if not isinstance(weights, dict) or not any(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"'{label}' holds no tensors. Choose a model's weight file.")
    return weights, metadata or {}


def _read_folder(folder: Path, label: str) -> tuple[StateDict, dict[str, str]]:
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    files = _shards(index, label) if index else sorted(folder.glob("*.safetensors"))[:1]
    if not files:
        raise CheckpointError(f"'{label}' holds no .safetensors file. Download the whole folder again.")
    weights, metadata = {}, {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"'{label}/{file.name}' is not there. Download the whole folder again.")
        part, metadata = _read_file(file, f"{label}/{file.name}")
        weights |= part
    return weights, metadata


def _shards(index: Path, label: str) -> list[Path]:
    """The files that an index names, all of them in its own folder."""
    content = read_json(index, f"{label}/{index.name}")
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"'{label}/{index.name}' is not a shard index. Download it again.")
    return [index.parent / Path(name).name for name in sorted(set(names.values()))]


def _read_config(path: Path, label: str) -> dict[str, Any]:
    config = read_json(path, f"{label}/config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"'{label}/config.json' is not a JSON object. Download the folder again.")
    return config


def read_json(path: Path, label: str) -> Any:
    """The content of a JSON file. Raises CheckpointError, which calls it ``label``."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"'{label}' is not there. Download the whole folder again.") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise CheckpointError(f"'{label}' cannot be read, {_first_line(error)}. Download it again.") from error


def _impostor(path: Path) -> str | None:
    with path.open("rb") as file:
        beginning = file.read(64).lstrip()
    return next((what for start, what in _IMPOSTORS.items() if beginning.startswith(start)), None)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
