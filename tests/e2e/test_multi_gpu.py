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
from safetensors.torch import save_file

from zimage_turbo.launcher import pack_link

from . import editor, graphs
from .client import Client
from .graphs import LOADER, PROMPT, SAMPLER, SAVE, changed, turbo
from .servers import running
from .sight import shows_the_saved_prompt

LORA = "two_layers.safetensors"
SEVERAL = graphs.SAVED.with_name(f"{editor.SEVERAL}.json")
ONE_LEVEL = 1  # of 255: ranks have a thread each, the server has all cores, and sums are in another order
PATIENCE = 60.0
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the two ranks of a machine without a GPU")


@pytest.fixture(scope="module")
def base(pack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi")
    pack_link.ensure(folder / "custom_nodes", pack)
    (folder / "models/loras").mkdir(parents=True)
    save_file(lora(), folder / "models/loras" / LORA)
    return folder


@pytest.fixture(scope="module")
def server(comfyui, base):
    """One of its own: some tests end its processes, and the last one ends it."""
    with running(comfyui, base, "server-multi-gpu") as running_server:
        yield running_server


def lora() -> dict[str, torch.Tensor]:
    """For the demo, of rank 4."""
    width, generator = 256, torch.Generator().manual_seed(1)
    return {
        f"diffusion_model.{layer}.attention.out.lora_{part}.weight": torch.randn(shape, generator=generator) * 0.1
        for layer in ("layers.0", "context_refiner.0")
        for part, shape in (("A", (4, width)), ("B", (width, 4)))
    }


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
    assert state["multi_gpu"]["choice"]["reason"] == "8 images whole, 2 ranks"


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


def by_ksampler(graph: graphs.Graph, steps: int) -> graphs.Graph:
    """Guided, so that each evaluation is of twice as many rows; with a LoRA."""
    graph["8"] = graphs.node("LoraLoaderModelOnly", model=[LOADER, 0], lora_name=LORA, strength_model=1.0)
    graph[SAMPLER] = graphs.node(
        "KSampler", model=["8", 0], positive=[PROMPT, 0], negative=["7", 0], latent_image=["9", 0], seed=1,
        steps=steps, cfg=2.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip
    graph["7"] = graphs.node("ConditioningZeroOut", conditioning=[PROMPT, 0])
    graph["9"] = graphs.node("EmptySD3LatentImage", width=192, height=128, batch_size=3)
    del graph[SAVE]["inputs"]["report"]
    return graph


def by_custom_sampler(graph: graphs.Graph, steps: int) -> graphs.Graph:
    graph["6"] = graphs.node("KSamplerSelect", sampler_name="dpmpp_2m")
    graph["7"] = graphs.node("RandomNoise", noise_seed=3)
    graph["8"] = graphs.node("BasicGuider", model=[LOADER, 0], conditioning=[PROMPT, 0])
    graph["9"] = graphs.node("EmptySD3LatentImage", width=128, height=160, batch_size=1)
    graph["10"] = graphs.node("BasicScheduler", model=[LOADER, 0], scheduler="simple", steps=steps, denoise=1.0)
    graph[SAMPLER] = graphs.node(
        "SamplerCustomAdvanced", noise=["7", 0], guider=["8", 0], sampler=["6", 0], sigmas=["10", 0],
        latent_image=["9", 0],
    )  # fmt: skip
    del graph[SAVE]["inputs"]["report"]
    return graph


@pytest.mark.parametrize(("split", "sampler"), [("images", by_ksampler), ("sequence", by_custom_sampler)])
async def test_stock_samplers_have_their_evaluations_made_by_ranks(comfy, server, split, sampler):
    drawn = await comfy.draw(sampler(several(split=split), 3))
    assert same_up_to_rounding(drawn, await comfy.draw(sampler(turbo(), 3)))
    assert "one GPU alone" not in server.log.read_text(encoding="utf-8")


async def test_a_rank_killed_at_a_stock_sampler_loses_nothing(comfy):
    """Those in its place are told of the LoRA and the prompts, and meet, while the sampler waits."""
    wanted = await comfy.draw(by_ksampler(turbo(), 16))
    prompt_id = await comfy.queue(by_ksampler(several(split="sequence"), 16))
    await comfy.hear("progress", prompt_id=prompt_id, node=SAMPLER)
    (await ranks(comfy))[0].kill()
    result = await comfy.finish(prompt_id)
    drawn = np.stack([np.asarray(await comfy.picture(image)) for image in result.images])
    assert same_up_to_rounding(drawn, wanted)
    assert "rank 0 (cpu) ended" in (await until_well(comfy))["last_fault"]["what"]


async def test_ranks_end_when_memory_is_to_be_free(comfy):
    before, end = await ranks(comfy), time.monotonic() + PATIENCE
    await comfy.post("/free", {"unload_models": True})
    while "multi_gpu" in (state := await health(comfy)):
        assert time.monotonic() < end, state
        await asyncio.sleep(0.2)
    assert not any(process.is_running() for process in before)


async def test_another_number_of_ranks_is_started(comfy):
    assert len(await comfy.draw(several(num_gpus=1, seed=12, steps=1, batch_size=2))) == 2
    assert len(await ranks(comfy)) == 1


async def test_no_process_outlives_the_server(comfy, server):
    left = await ranks(comfy)
    (parent,) = {process.parent() for process in left}
    parent.parent().send_signal(signal.SIGKILL)
    gone, alive = psutil.wait_procs([*left, parent], timeout=20)
    assert not alive and len(gone) == 2
