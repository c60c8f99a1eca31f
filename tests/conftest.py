"""The pack as package ``zimage_turbo`` beside a real ComfyUI, as the host's own loader would have it.

ZIMAGE_COMFYUI names the ComfyUI tree; without it, the one that the pack lies in.
"""

import os
import sys
import types
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parent.parent


def _comfyui() -> Path:
    tree = Path(os.environ.get("ZIMAGE_COMFYUI", PACK.parent.parent))
    if not (tree / "comfyui_version.py").is_file():
        pytest.exit(f"No ComfyUI in {tree}. Run 'python install.py test', or set ZIMAGE_COMFYUI to a ComfyUI tree.", 4)
    return tree


COMFYUI = _comfyui()
# ComfyUI's modules are called nodes, server and so on: its tree stands first and the pack's root nowhere.
sys.path[:] = [str(COMFYUI), *(entry for entry in sys.path if Path(entry or ".").resolve() != PACK)]
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

_arguments, sys.argv = sys.argv, sys.argv[:1]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import torch  # noqa: E402

if not torch.cuda.is_available():
    sys.argv.append("--cpu")
import comfy.cli_args  # noqa: E402

sys.argv = _arguments


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI tree."""
    return COMFYUI


@pytest.fixture(scope="session")
def pack() -> Path:
    """The root of the pack."""
    return PACK


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def demo():
    """MODEL, CLIP and VAE of the demo, as the loader gives them."""
    from zimage_turbo.engine import catalogue, loading

    return loading.load(catalogue.resolve("demo", "auto", "auto"), "auto", None)
