"""Which model files there are and which ones a choice means: ComfyUI's folders, diffusers folders, the demo."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from .checkpoint import CheckpointError
from .model import OFFICIAL_FILE

AUTO, DEMO, DIFFUSERS = "auto", "demo", "diffusers/"
DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo"
KINDS = {"diffusion_model": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
OFFICIAL = {
    "diffusion_model": OFFICIAL_FILE,
    "text_encoder": "qwen_3_4b.safetensors",
    "vae": "ae.safetensors",
}
# What another build of the same file is called, compared in lower case with '-' and ' ' as '_'.
_STEMS = {"diffusion_model": "z_image_turbo", "text_encoder": "qwen_3_4b", "vae": "ae."}
_COMPONENTS = {"diffusion_model": "transformer", "text_encoder": "text_encoder", "vae": "vae"}


@dataclass(frozen=True)
class Parts:
    """Where the three models are: weight files or diffusers component folders."""

    diffusion_model: Path
    text_encoder: Path
    vae: Path

    def fingerprint(self) -> str:
        """Changes when one of the files is replaced: a digest of names, sizes and modification times.

        A digest, because the host writes it into every saved picture, where no path of the machine belongs.
        """
        files = [file for path in vars(self).values() for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
        states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        return hashlib.sha256(repr(states).encode()).hexdigest()


def options(kind: str) -> list[str]:
    """What the loader's combo box offers for a key of KINDS, 'auto' first."""
    folders = [DEMO, *sorted(_diffusers_folders())] if kind == "diffusion_model" else []
    return [AUTO, *folders, *folder_paths.get_filename_list(KINDS[kind])]


def problem(kind: str, name: str) -> str | None:
    """Why a name cannot be chosen, or None."""
    if name in options(kind):
        return None
    place = f"models/{KINDS[kind]}"
    if name.lower().endswith(".gguf"):
        return (
            f"{kind} '{name}' is a GGUF file, which this loader does not read. Load it by a node made for GGUF and "
            f"connect that here in the loader's place, or put {OFFICIAL[kind]} into {place}."
        )
    every = options(kind)
    present = ", ".join(every[:8]) + (f" … ({len(every)} in all)" if len(every) > 8 else "")
    return (
        f"{kind} '{name}' is not in {place}. Put the file there and press R in the editor, "
        f"or choose one of: {present}. 'auto' takes {OFFICIAL[kind]} or the built-in demo."
    )


def resolve(diffusion_model: str, text_encoder: str, vae: str) -> Parts:
    """The paths that a choice of three names means.

    'auto' for the diffusion model is the official file, else a Turbo folder in models/diffusers, else the demo; for the
    other two it is the same folder's part, or the official file. Raises CheckpointError naming what is missing.
    """
    chosen = {"diffusion_model": diffusion_model, "text_encoder": text_encoder, "vae": vae}
    for kind, name in chosen.items():
        if reason := problem(kind, name):
            raise CheckpointError(reason)
    folder = _folder(diffusion_model)
    if folder is not None:
        chosen["diffusion_model"] = AUTO
    return Parts(**{kind: _path(kind, name, folder) for kind, name in chosen.items()})


def remark(diffusion_model: str) -> str | None:
    """What to tell of a choice that means the demo though it does not say so."""
    if diffusion_model != AUTO or _folder(AUTO) != DEMO_FOLDER:
        return None
    found = [*sorted(_diffusers_folders()), *folder_paths.get_filename_list(KINDS["diffusion_model"])]
    said = f"the built-in demo draws, since there is no {OFFICIAL['diffusion_model']}"
    if not found:
        return f"{said} in models/{KINDS['diffusion_model']}"
    named = ", ".join(found[:4]) + (" …" if len(found) > 4 else "")
    return f"{said}: 'auto' does not know what the others are. If one is a Z-Image-Turbo, choose it by name: {named}"


def _folder(diffusion_model: str) -> Path | None:
    if diffusion_model == DEMO:
        return DEMO_FOLDER
    found = _diffusers_folders()
    if diffusion_model in found:
        return found[diffusion_model]
    if diffusion_model == AUTO and _official_file("diffusion_model") is None:
        turbo = (folder for name, folder in found.items() if "turbo" in name.lower())  # Base and Edit need other steps
        return next(turbo, DEMO_FOLDER)
    return None


def _path(kind: str, name: str, folder: Path | None) -> Path:
    if name != AUTO:
        return Path(folder_paths.get_full_path_or_raise(KINDS[kind], name))
    if folder is not None:
        component = folder / _COMPONENTS[kind]
        if not component.is_dir():
            raise CheckpointError(
                f"The diffusers folder '{folder.name}' has no part '{component.name}'. "
                "Download the whole folder again, or choose a file for this input."
            )
        return component
    official = _official_file(kind)
    if official is None:
        raise CheckpointError(
            f"{kind} is 'auto', but {OFFICIAL[kind]} is not in models/{KINDS[kind]}. "
            "Put it there, choose another file, or set diffusion_model to 'demo'."
        )
    return Path(folder_paths.get_full_path_or_raise(KINDS[kind], official))


def _official_file(kind: str) -> str | None:
    names = folder_paths.get_filename_list(KINDS[kind])
    if OFFICIAL[kind] in names:
        return OFFICIAL[kind]
    return next(
        (
            name
            for name in names
            if Path(name).name.lower().replace("-", "_").replace(" ", "_").startswith(_STEMS[kind])
        ),
        None,
    )


def _diffusers_folders() -> dict[str, Path]:
    """Choice to path of the Z-Image folders in models/diffusers, by their model_index.json."""
    found = {}
    for root in folder_paths.get_folder_paths("diffusers"):
        for index in sorted(Path(root).glob("*/model_index.json")):
            try:
                content = json.loads(index.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                logging.warning("Z-Image-Turbo: %s cannot be read and is not offered: %s", index, error)
                continue
            if isinstance(content, dict) and str(content.get("_class_name")).startswith("ZImage"):
                found[DIFFUSERS + index.parent.name] = index.parent
    return found
