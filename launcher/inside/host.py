"""Makes a process one of ComfyUI's without its server, for tests and benchmarks. Runs inside the environment."""

import os
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent.parent


def tree() -> Path:
    """The ComfyUI tree: ZIMAGE_COMFYUI, or the one that the pack lies in. Raises FileNotFoundError."""
    found = Path(os.environ.get("ZIMAGE_COMFYUI", PACK.parent.parent))
    if not (found / "comfyui_version.py").is_file():
        raise FileNotFoundError(
            f"No ComfyUI in {found}. Run 'python install.py test', or set ZIMAGE_COMFYUI to a ComfyUI tree."
        )
    return found


def enter(comfyui: Path, options: list[str]) -> None:
    """ComfyUI's modules become importable, its options are read from ``options``; --cpu where there is no GPU.

    Its modules are called nodes, server and so on, so its tree stands first on the path and the pack's root nowhere.
    """
    sys.path[:] = [str(comfyui), *(entry for entry in sys.path if Path(entry or ".").resolve() != PACK)]
    arguments, sys.argv = sys.argv, [sys.argv[0], *options]
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    if not torch.cuda.is_available():
        sys.argv.append("--cpu")
    import comfy.cli_args

    sys.argv = arguments
