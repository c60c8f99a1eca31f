"""One real server for all end-to-end tests, and a client of it for each test."""

import pytest
import pytest_asyncio

from zimage_turbo.launcher import pack_link

from . import damage
from .client import Client
from .servers import running


@pytest.fixture(scope="session")
def base(tmp_path_factory, pack):
    """The server's base directory: models, input, output, user, and the pack in custom_nodes."""
    folder = tmp_path_factory.mktemp("comfyui")
    pack_link.ensure(folder / "custom_nodes", pack)
    for name in ("diffusion_models", "text_encoders", "vae", "diffusers"):
        (folder / "models" / name).mkdir(parents=True)
    (folder / "input").mkdir()
    damage.place(folder / "models")
    return folder


@pytest.fixture(scope="session")
def server(comfyui, base):
    with running(comfyui, base, "server") as running_server:
        yield running_server


@pytest_asyncio.fixture
async def comfy(server):
    async with Client.connected(server.url) as client:
        yield client
