"""What the server is asked, and whether the processes of multi-gpu stay for it."""

import re
from types import SimpleNamespace

import execution
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from zimage_turbo.engine.group.current import FREE_SECONDS, GRACE_SECONDS
from zimage_turbo.server import need


class Recorder:
    """In place of `current`: what was asked of it."""

    def __init__(self):
        self.told = []

    def stay(self):
        self.told.append("stay")

    def leave(self, *seconds, waiting=True):
        self.told.append(("leave", *seconds) if waiting else ("leave", *seconds, "whatever waits"))


class Host:
    """As much of the host's server as this needs."""

    def __init__(self):
        self.app, self.handlers = web.Application(), []
        self.prompt_queue = execution.PromptQueue(SimpleNamespace(queue_updated=lambda: None))
        self.add_on_prompt_handler = self.handlers.append


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(need, "current", recorder)
    return recorder


@pytest.fixture
def told(recorder):
    return recorder.told


def loader(device):
    return {"1": {"class_type": "ZImageTurboLoader", "inputs": {"diffusion_model": "auto", "device": device}}}


@pytest.mark.parametrize(
    ("prompt", "stays"),
    [
        (loader("multi-gpu"), True),
        (loader(["7", 0]), True),
        (loader("auto"), False),
        ({"1": {"class_type": "EmptyImage", "inputs": {}}}, False),
        ({"1": {"class_type": "EmptyImage"}, "2": "no node", "3": {"inputs": 3}}, False),
        (None, False),
        (["no prompt"], False),
    ],
)
def test_prompts(told, prompt, stays):
    host = Host()
    need.watch(host)
    (posted,) = host.handlers
    body = {"prompt": prompt}
    assert posted(body) is body
    assert told == ["stay" if stays else ("leave",)]
    assert posted([]) == [], "what is no prompt at all is for the host to refuse"


def test_which_prompts_want_them(recorder, host):
    """Also behind others in the queue."""
    for number, device in enumerate(("auto", "multi-gpu", "auto")):
        host.prompt_queue.put((number, str(number), loader(device), {}, [], {}))
    wanted = []
    for _ in range(3):
        _, running = host.prompt_queue.get()
        wanted.append((recorder.wanted(True), recorder.wanted(False)))
        host.prompt_queue.task_done(running, {}, None)
    assert wanted == [(True, False), (True, True), (False, False)]


@pytest.fixture
def host():
    host = Host()
    need.watch(host)
    return host


@pytest_asyncio.fixture
async def client(host):
    async def free(request):
        return web.Response(status=200 if isinstance(await request.json(), dict) else 400)

    host.app.router.add_post("/free", free)
    async with TestClient(TestServer(host.app)) as made:
        yield made


@pytest.mark.parametrize(
    ("asked", "leaves"),
    [({"unload_models": True}, True), ({"free_memory": True}, True), ({"unload_models": False}, False), ([], False)],
)
async def test_memory_that_is_to_be_free(told, client, asked, leaves):
    await client.post("/free", json=asked)
    assert told == ([("leave", FREE_SECONDS, "whatever waits")] if leaves else [])


@pytest.mark.parametrize(
    "page", ["README.md", "README.zh.md", "web/docs/ZImageTurboLoader.md", "web/docs/ZImageTurboLoader/zh.md"]
)
def test_pages_say_how_long_they_stay(pack, page):
    text = (pack / page).read_text(encoding="utf-8")
    assert all(re.search(rf"(?<!\d){seconds:g} s\b", text) for seconds in (GRACE_SECONDS, FREE_SECONDS))
