"""The pack as package ``zimage_turbo`` beside a real ComfyUI, as the host's own loader would have it.

ZIMAGE_COMFYUI names the ComfyUI tree; without it, the one that the pack lies in.
"""

import os
import signal
import sys
import types
import zlib
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.launcher.inside import host  # noqa: E402

try:
    COMFYUI = host.tree()
except FileNotFoundError as error:
    pytest.exit(str(error), 4)
host.enter(COMFYUI, [])

import torch  # noqa: E402

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # So a shell starts its background jobs, and what tests start and end by Ctrl-C would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    # Our Triton kernels then run in Triton's interpreter, which must be asked for before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI tree."""
    return COMFYUI


@pytest.fixture(scope="session")
def pack() -> Path:
    """The root of the pack."""
    return PACK


@pytest.fixture(autouse=True)
def _seeded(request):
    """Each test draws its own numbers, the same in every run: a failure comes again."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def demo():
    """MODEL, CLIP and VAE of the demo, as the loader gives them."""
    from zimage_turbo.engine import catalogue, loading

    return loading.load(catalogue.resolve("demo", "auto", "auto"), "auto", None)
