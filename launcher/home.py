"""Where the launcher keeps what it makes: one folder that can be deleted at any time."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path

PACK_NAME = "z-image-turbo"
DEFAULT_WORKFLOW = "Z-Image-Turbo_SingleCard"


@dataclasses.dataclass(frozen=True)
class Home:
    """``pack`` is the folder of install.py as the user named it, links not resolved; ``runtime`` holds our state."""

    pack: Path
    runtime: Path

    @classmethod
    def of(cls, pack: Path, environ: Mapping[str, str]) -> "Home":
        """Use ``<pack>/.runtime`` unless the environment variable ZIMAGE_HOME names another folder."""
        chosen = environ.get("ZIMAGE_HOME")
        return cls(pack, Path(chosen).expanduser().absolute() if chosen else pack.resolve() / ".runtime")

    @property
    def venv(self) -> Path:
        """One environment a Python minor version, so that switching Python never mixes compiled packages."""
        return self.runtime / f"venv-{sys.version_info.major}.{sys.version_info.minor}"

    @property
    def comfyui(self) -> Path:
        return self.runtime / "ComfyUI"

    @property
    def base(self) -> Path:
        """ComfyUI's base directory: models, custom_nodes, input, output and user."""
        return self.runtime / "base"

    @property
    def logs(self) -> Path:
        return self.runtime / "logs"

    @property
    def default_workflow(self) -> Path:
        return self.pack / "workflows" / "api" / f"{DEFAULT_WORKFLOW}.json"


def venv_program(venv: Path, name: str) -> Path:
    """Return the path of ``name`` (python, pytest) inside a virtual environment of this operating system."""
    return venv / "Scripts" / f"{name}.exe" if os.name == "nt" else venv / "bin" / name
