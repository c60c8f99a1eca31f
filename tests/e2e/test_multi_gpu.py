"""device = multi-gpu on a real server: two processes without a GPU draw the workflow for several cards as shipped."""

import asyncio
import json
import signal
import time

import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch

from zimage_turbo.launcher import pack_link

from . import editor, graphs
from .client import Client
from .graphs import LOADER, SAMPLER, changed, turbo
from .servers import running
from .sight import shows_the_saved_prompt

SEVERAL = graphs.SAVED.with_name(f"{editor.SEVERAL}.json")
ONE_LEVEL = 1  # of 255: ranks have a thread each, the server has all cores, and sums are in another order
PATIENCE = 60.0
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the two ranks of a machine without a GPU")


@pytest.fixture(scope="module")
def base(pack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi")
    pack_link.ensure(folder / "custom_nodes", pack)
    return folder


@pytest.fixture(scope="module")
def server(comfyui, base):
    """One of its own: some tests end its processes, and the last one ends it."""
    with running(comfyui, base, "server-multi-gpu") as running_server:
        yield running_server


@pytest_asyncio.fixture
async def comfy(server):
    async with Client.connected(server.url) as client:
        yield client


def several(**inputs):
    return changed(json.loads(SEVERAL.read_text(encoding="utf-8")), **inputs)


async def health(comfy) -> dict:
    return await comfy.get("/health")


async def ranks(comfy) -> list[psutil.Process]:
    return [psutil.Process(rank["pid"]) for rank in (await health(comfy))["multi_gpu"]["ranks"]]


async def until_well(comfy) -> dict:
    end = time.monotonic() + PATIENCE
    while (state := await health(comfy))["status"] != "ok":
        assert time.monotonic() < end, state
        await asyncio.sleep(0.2)
    return state["multi_gpu"]


def same_up_to_rounding(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape and np.abs(ours.astype(int) - theirs).max() <= ONE_LEVEL


async def test_the_shipped_workflow_draws_its_batch_on_two_ranks(comfy):
    drawn = await comfy.draw(several())
    assert len(drawn) == 8 and all(shows_the_saved_prompt(picture) for picture in drawn)
    state = await health(comfy)
    assert state["status"] == "ok" and state["multi_gpu"]["state"] == "ok"
    assert [rank["device"] for rank in state["multi_gpu"]["ranks"]] == ["cpu", "cpu"]


def test_the_shipped_workflow_runs_in_the_browser(newcomer):
    newcomer.close_templates()
    newcomer.open_from_list(editor.SEVERAL)
    newcomer.set("ZImageTurboSampler", "steps", 2)
    newcomer.run()
    shown = newcomer.pictures(8)
    assert [(width, height) for _, width, height in shown] == [(256, 256)] * 8
    newcomer.screenshot("multi_gpu")


async def test_pictures_are_those_of_one_process(comfy):
    settings = {"seed": 7, "steps": 3, "batch_size": 3, "width": 192, "height": 128}
    assert same_up_to_rounding(await comfy.draw(several(**settings)), await comfy.draw(turbo(**settings)))


async def test_progress_and_previews_come_from_ranks(comfy):
    prompt_id = await comfy.queue(several(seed=8, steps=3, batch_size=2), preview_method="latent2rgb")
    result = await comfy.finish(prompt_id)
    steps = [told for told in result.told("progress") if told["node"] == SAMPLER]
    assert [told["value"] for told in steps] == list(range(1, 7)) and {told["max"] for told in steps} == {6}
    assert len(result.told("preview")) >= 6


async def test_cancel_stops_the_ranks_and_the_next_prompt_runs(comfy):
    prompt_id = await comfy.queue(several(seed=9, steps=graphs.CANCELLED_STEPS, batch_size=4))
    await comfy.hear("progress", prompt_id=prompt_id, node=SAMPLER)
    await comfy.post("/interrupt", {"prompt_id": prompt_id})
    result = await comfy.finish(prompt_id)
    assert "execution_interrupted" in result.messages
    drawn = await comfy.draw(several(seed=10, steps=2, batch_size=2))
    assert len(drawn) == 2 and (await health(comfy))["multi_gpu"]["last_fault"] is None


@pytest.mark.parametrize(("number", "split"), [(0, "images"), (1, "sequence")])
async def test_a_killed_rank_loses_no_picture(comfy, number, split):
    """Alone at its pictures, or while the other one waits for its share of a picture."""
    settings = {"seed": 11 + number, "steps": 4, "batch_size": 4, "width": 192, "height": 192}
    wanted = await comfy.draw(turbo(**settings))
    prompt_id = await comfy.queue(several(**settings, split=split))
    await comfy.hear("progress", prompt_id=prompt_id, node=SAMPLER)
    (await ranks(comfy))[number].kill()
    seen = set()
    while prompt_id not in await comfy.get("/history"):
        seen.add((await health(comfy))["status"])
        await asyncio.sleep(0.1)
    result = await comfy.finish(prompt_id)
    drawn = np.stack([np.asarray(await comfy.picture(image)) for image in result.images])
    assert same_up_to_rounding(drawn, wanted)
    assert "degraded" in seen
    state = await until_well(comfy)
    assert f"rank {number} (cpu) ended" in state["last_fault"]["what"] and len(state["ranks"]) == 2


async def test_stock_sampler_runs_beside_it(comfy):
    """By this process itself: a stock sampler asks the MODEL, which holds its weights here too."""
    graph = several(batch_size=1)
    graph[SAMPLER] = graphs.node(
        "KSampler", model=[LOADER, 0], positive=["2", 0], negative=["2", 0], latent_image=["9", 0], seed=1, steps=2,
        cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    graph["9"] = graphs.node("EmptySD3LatentImage", width=128, height=128, batch_size=1)
    del graph["5"]["inputs"]["report"]
    assert len(await comfy.draw(graph)) == 1


async def test_more_ranks_take_the_place_of_the_first_ones(comfy):
    before = await ranks(comfy)
    assert len(await comfy.draw(several(num_gpus=1, seed=12, steps=1, batch_size=2))) == 2
    assert len(await ranks(comfy)) == 1
    assert not any(process.is_running() for process in before)


async def test_no_process_outlives_the_server(comfy, server):
    left = await ranks(comfy)
    (parent,) = {process.parent() for process in left}
    parent.parent().send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs([*left, parent], timeout=20)
    assert not alive and len(gone) == 2
