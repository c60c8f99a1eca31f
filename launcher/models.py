"""Finds the official Z-Image-Turbo files in the folders ComfyUI searches."""

import dataclasses
import os
from pathlib import Path

# (part, file, folder under models/ where it belongs, further folders ComfyUI searches for the same kind)
OFFICIAL_FILES = (
    ("Transformer", "z_image_turbo_bf16.safetensors", "diffusion_models", ("unet",)),
    ("Text encoder", "qwen_3_4b.safetensors", "text_encoders", ("clip",)),
    ("VAE", "ae.safetensors", "vae", ()),
)


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """``path`` is None when the file was not found; ``folder`` is where to put it."""

    part: str
    name: str
    folder: Path
    path: Path | None


def search(models: Path, extra: dict[str, list[Path]]) -> list[ModelFile]:
    """Look for the official files below ``models`` and in the ``extra`` folders of each kind."""
    found = []
    for part, name, kind, aliases in OFFICIAL_FILES:
        kinds = (kind, *aliases)
        folders = [models / each for each in kinds] + [folder for each in kinds for folder in extra.get(each, [])]
        hits = [hit for folder in folders if folder.is_dir() for hit in sorted(folder.rglob(name))]
        found.append(ModelFile(part, name, models / kind, hits[0] if hits else None))
    return found


def extra_folders(tree: Path) -> dict[str, list[Path]]:
    """Read ComfyUI's extra_model_paths.yaml; empty when there is none.

    Raises ImportError without PyYAML (ComfyUI itself needs it, so its Python has it) and ValueError when the file
    is not of the form ComfyUI documents.
    """
    file = tree / "extra_model_paths.yaml"
    if not file.is_file():
        return {}
    import yaml

    try:
        sections = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(sections, dict):
        raise ValueError(f"{file} holds no sections")
    return folders_of(sections, file.parent)


def folders_of(sections: dict, start: Path) -> dict[str, list[Path]]:
    """Turn the sections of extra_model_paths.yaml into folders by kind; relative paths begin at ``start``."""
    folders: dict[str, list[Path]] = {}
    for section in sections.values():
        if not isinstance(section, dict):
            continue
        base = start / os.path.expandvars(os.path.expanduser(section.get("base_path", "")))
        for kind, lines in section.items():
            if kind not in ("base_path", "is_default"):
                folders.setdefault(kind, []).extend(base / line.strip() for line in str(lines).split("\n") if line)
    return folders
