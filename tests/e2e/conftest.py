"""One real server for all end-to-end tests, and for each test a client of it, or the editor in a real browser."""

import pytest
import pytest_asyncio
from playwright.sync_api import sync_playwright

from zimage_turbo.launcher import pack_link, shelf

from . import damage
from .client import Client
from .editor import Editor, browser_path, foreign_addresses, forget_settings
from .servers import running

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


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


@pytest.fixture(scope="module")
def browser():
    if browser_path() is None:
        pytest.skip("no Chromium: set CHROMIUM or install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def listed(base, pack, server):
    """The shipped workflows in the editor's list, as the launcher puts them there."""
    shelf.place(pack / "workflows", base / "user" / "default" / "workflows", base / "shelf.json")


@pytest.fixture
def newcomer(browser, server, base, listed):
    """The editor as it opens on the very first visit."""
    forget_settings(base)
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    context.route(foreign_addresses(), lambda route: route.abort())
    editor = Editor(context.new_page(), server.url)
    editor.open()
    yield editor
    context.close()
