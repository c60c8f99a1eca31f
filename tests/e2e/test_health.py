"""GET /health on a real server: at rest, at work, after an error, beside another pack's /health; 503 in process."""

import json
import threading

import execution
import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from zimage_turbo.launcher import pack_link
from zimage_turbo.server.routes import add_health

from .client import Client
from .damage import PLACED
from .graphs import CANCELLED_STEPS, SAMPLER, node, turbo
from .servers import running

KEYS = {
    "status",
    "uptime",
    "version",
    "comfyui",
    "torch",
    "device",
    "loaded_models",
    "memory",
    "queue",
    "last_error",
}


@pytest.mark.parametrize("path", ["/health", "/zimage/health", "/api/health", "/api/zimage/health"])
async def test_at_rest_every_path_says_ok(comfy, path):
    state = await comfy.get(path)
    assert set(state) == KEYS
    assert state["status"] == "ok"
    assert state["uptime"] > 0
    assert state["queue"] == {"running": 0, "pending": 0}
    assert state["memory"]["process_mib"] > 100


async def test_at_work_it_says_what_runs_and_how_far_it_is(comfy):
    prompt_id = await comfy.queue(turbo(seed=20, steps=CANCELLED_STEPS))
    waiting = await comfy.queue(turbo(seed=21, steps=1))
    steps = []
    for _ in range(3):  # each look comes after a step was told that the one before has not seen
        heard = 0
        while heard <= max(steps, default=0):
            heard = (await comfy.hear("progress", prompt_id=prompt_id, node=SAMPLER)).data["value"]
        state = await comfy.get("/health")
        assert state["status"] == "ok"
        assert (state["queue"]["running"], state["queue"]["pending"]) == (1, 1)
        current = state["queue"]["current"]
        assert (current["prompt_id"], current["node"]) == (prompt_id, "ZImageTurboSampler")
        done, total = current["progress"]
        assert total == CANCELLED_STEPS
        steps.append(done)
    assert 0 < steps[0] < steps[1] < steps[2]
    assert "Lumina2" in {model["model"] for model in state["loaded_models"]}
    await comfy.post("/interrupt", {"prompt_id": prompt_id})
    await comfy.finish(prompt_id)
    assert (await comfy.finish(waiting)).status == "success"
    assert (await comfy.get("/health"))["queue"] == {"running": 0, "pending": 0}


async def test_during_loading_it_answers_and_names_the_loader(comfy):
    prompt_id = await comfy.queue(turbo(seed=22, steps=1, precision="bf16"))
    await comfy.hear("executing", prompt_id=prompt_id, node="1")
    state = await comfy.get("/health")
    assert state["status"] == "ok"
    assert state["queue"]["current"]["prompt_id"] == prompt_id
    assert (await comfy.finish(prompt_id)).status == "success"


async def test_after_a_loading_error_it_stays_ok_and_names_node_and_file(comfy, base):
    corrupt = base / "models" / "diffusion_models" / "corrupt.safetensors"
    corrupt.write_bytes(b"\xff" * 4096)
    result = await comfy.run(turbo(diffusion_model=corrupt.name, **PLACED))
    corrupt.unlink()
    state = await comfy.get("/health")
    assert state["status"] == "ok"
    error = state["last_error"]
    assert (error["prompt_id"], error["node"]) == (result.prompt_id, "ZImageTurboLoader")
    assert corrupt.name in error["error"]
    assert abs(error["time"] - result.error["timestamp"] / 1000) < 1


async def test_the_node_gives_the_same_document(comfy):
    result = await comfy.run({"1": node("ZImageTurboHealth")})
    (text,) = result.outputs["1"]["text"]
    state = json.loads(text)
    assert set(state) == set(await comfy.get("/health"))
    assert state["queue"]["current"]["prompt_id"] == result.prompt_id


OTHER_PACK = """
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS = {}


@PromptServer.instance.routes.get("/health")
async def health(request):
    return web.json_response({"owner": "other"})
"""


@pytest.mark.parametrize("first", ["other", "ours"])
async def test_another_packs_health_stays_and_ours_is_beside_it(comfyui, pack, tmp_path, first):
    folders = {owner: tmp_path / owner / "custom_nodes" for owner in ("other", "ours")}
    pack_link.ensure(folders["ours"], pack)
    (folders["other"] / "health").mkdir(parents=True)
    (folders["other"] / "health" / "__init__.py").write_text(OTHER_PACK, encoding="utf-8")
    # The host loads the base directory's packs, then those of the extra path.
    base, extra = (tmp_path / owner for owner in sorted(folders, key=lambda owner: owner != first))
    paths = tmp_path / "extra_model_paths.yaml"
    paths.write_text(json.dumps({"second": {"base_path": str(extra), "custom_nodes": "custom_nodes"}}))
    name = f"server-{first}-loaded-first"
    with running(comfyui, base, name, "--extra-model-paths-config", paths) as server:
        async with Client.connected(server.url) as client:
            assert (await client.get("/zimage/health"))["status"] == "ok"
            assert await client.get("/health") == {"owner": "other"}
            assert await client.get("/api/health") == {"owner": "other"}


class Host:
    """As much of the host's server as health needs, in this process."""

    def __init__(self):
        self.app = web.Application()
        self.routes = web.RouteTableDef()
        self.prompt_queue = execution.PromptQueue(self)

    def queue_updated(self):
        """The real one tells the browsers."""


@pytest_asyncio.fixture
async def in_process():
    host = Host()
    add_health(host)
    host.app.add_routes(host.routes)
    async with TestClient(TestServer(host.app)) as client:
        yield client


async def test_without_a_prompt_worker_it_answers_503_with_the_reason(in_process):
    response = await in_process.get("/health")
    state = await response.json()
    assert response.status == 503
    assert state["status"] == "error"
    assert "prompt worker" in state["reason"] and "restart ComfyUI" in state["reason"]
    assert set(state) == KEYS | {"reason"}


async def test_with_a_prompt_worker_it_answers_200(in_process):
    stop = threading.Event()

    def prompt_worker():
        stop.wait()

    thread = threading.Thread(target=prompt_worker)
    thread.start()
    try:
        assert (await in_process.get("/health")).status == 200
    finally:
        stop.set()
        thread.join()
