"""Saved workflows over the API, as a service runs them: pictures, progress, cancelling, the queue, stock nodes."""

import io
import json
import shutil
import subprocess
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image

from . import graphs
from .graphs import CANCELLED_STEPS, SAMPLER, changed, turbo
from .sight import shows_the_saved_prompt, verdict


async def sampling(comfy, prompt_id: str):
    """Wait until the sampler of a prompt has made a step."""
    await comfy.hear("progress", prompt_id=prompt_id, node=SAMPLER)


def curl(*arguments: str) -> bytes:
    command = ["curl", "--silent", "--show-error", "--fail-with-body", "--noproxy", "*", *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_saved_workflow_posted_with_curl_draws_what_its_prompt_says(comfy, tmp_path):
    body = tmp_path / "body.json"
    body.write_text(json.dumps({"prompt": graphs.saved(), "client_id": comfy.name}), encoding="utf-8")
    accepted = curl("--header", "Content-Type: application/json", "--data", f"@{body}", f"{comfy.url}/prompt")
    prompt_id = json.loads(accepted)["prompt_id"]
    await comfy.finish(prompt_id)
    entry = json.loads(curl(f"{comfy.url}/history/{prompt_id}"))[prompt_id]
    assert entry["status"]["status_str"] == "success"
    (image,) = entry["outputs"][graphs.SAVE]["images"]
    file = curl(f"{comfy.url}/view?{urlencode(image)}")
    assert file.startswith(b"\x89PNG\r\n\x1a\n")
    picture = Image.open(io.BytesIO(file))
    assert picture.size == (256, 256)
    assert shows_the_saved_prompt(np.asarray(picture.convert("RGB")))


async def test_the_picture_carries_its_prompt_and_workflow(comfy, pack):
    workflow = json.loads((pack / "workflows" / "Z-Image-Turbo_SingleCard.json").read_text(encoding="utf-8"))
    graph = turbo(seed=2, steps=1)
    result = await comfy.run(graph, extra_pnginfo={"workflow": workflow})
    picture = await comfy.picture(result.images[0])
    kept = {
        key: {"inputs": node["inputs"], "class_type": node["class_type"], "_meta": node["_meta"]}
        for key, node in json.loads(picture.info["prompt"]).items()
    }
    assert kept == graph
    assert json.loads(picture.info["workflow"]) == workflow


async def test_our_file_and_the_hosts_hold_the_same(comfy):
    graph = turbo(seed=2, steps=1, batch_size=3, filename_prefix="both/sign_%width%")
    graph["6"] = graphs.node("SaveImage", images=[graphs.DECODE, 0], filename_prefix="both/host_%width%")
    result = await comfy.run(graph, extra_pnginfo={"workflow": {"extra": {"说明": "红色"}}})
    ours, theirs = (result.outputs[key]["images"] for key in (graphs.SAVE, "6"))
    assert [image["filename"] for image in ours] == [f"sign_256_{number:05}_.png" for number in (1, 2, 3)]
    assert [image | {"filename": image["filename"].replace("host", "sign")} for image in theirs] == ours
    for one, other in zip(ours, theirs, strict=True):
        one, other = await comfy.picture(one), await comfy.picture(other)
        assert one.mode == other.mode and one.info["workflow"]
        assert one.info.pop("zimage_turbo")  # the sampler's report, which only our node is connected to
        assert one.info == other.info
        assert np.array_equal(np.asarray(one), np.asarray(other))


async def test_saving_a_batch_tells_its_progress(comfy):
    result = await comfy.run(turbo(seed=2, steps=1, batch_size=4))
    told = [data for data in result.told("progress") if data["node"] == graphs.SAVE]
    assert told[0]["max"] == 4 and told[-1]["value"] == 4


async def test_the_picture_tells_no_path_of_the_machine(comfy, pack):
    result = await comfy.run(turbo(seed=2, steps=1))
    assert str(pack.resolve()) not in (await comfy.picture(result.images[0])).info["prompt"]


async def test_the_same_seed_gives_the_same_pixels_and_another_seed_others(comfy):
    first = await comfy.draw(turbo(seed=3))
    # The native size written out: the same picture, but not the host's cached one.
    again = await comfy.run(turbo(seed=3, width=256, height=256))
    assert SAMPLER not in again.told("execution_cached")[0]["nodes"]
    assert np.array_equal(np.asarray(await comfy.picture(again.images[0])), first[0])
    other = await comfy.draw(turbo(seed=4))
    assert not np.array_equal(other, first)
    assert shows_the_saved_prompt(other[0])


async def test_every_step_is_told_with_a_preview(comfy):
    result = await comfy.run(turbo(seed=5), preview_method="latent2rgb")
    steps = [(data["value"], data["max"]) for data in result.told("progress") if data["node"] == SAMPLER]
    assert steps == [(step, 8) for step in range(1, 9)]
    previews = [data for data in result.told("preview") if data["node_id"] == SAMPLER]
    assert previews
    for preview in previews:
        width, height = Image.open(io.BytesIO(preview["image"])).size
        assert width == height


async def test_cancelling_stops_between_steps_and_the_next_prompt_succeeds(comfy):
    prompt_id = await comfy.queue(turbo(seed=6, steps=CANCELLED_STEPS))
    await sampling(comfy, prompt_id)
    assert (await comfy.post("/interrupt", {"prompt_id": prompt_id}))[0] == 200
    interrupted = await comfy.hear("execution_interrupted", prompt_id=prompt_id)
    assert interrupted.data["node_type"] == "ZImageTurboSampler"
    result = await comfy.finish(prompt_id)
    assert result.status == "error"
    assert "execution_interrupted" in result.messages
    assert result.outputs == {}
    assert result.told("progress")[-1]["value"] < CANCELLED_STEPS
    assert shows_the_saved_prompt((await comfy.draw(turbo(seed=6)))[0])


async def test_two_queued_prompts_finish_in_their_order(comfy):
    first = await comfy.queue(turbo(seed=7))
    second = await comfy.queue(turbo(seed=8))
    results = [await comfy.finish(first), await comfy.finish(second)]
    assert [result.status for result in results] == ["success", "success"]
    ends = [result.messages["execution_success"]["timestamp"] for result in results]
    assert ends == sorted(ends)
    assert results[0].images != results[1].images


async def test_a_waiting_prompt_can_be_deleted(comfy):
    running = await comfy.queue(turbo(seed=9, steps=CANCELLED_STEPS))
    await sampling(comfy, running)
    waiting = await comfy.queue(turbo(seed=10))
    assert [item[1] for item in (await comfy.get("/queue"))["queue_pending"]] == [waiting]
    assert (await comfy.post("/queue", {"delete": [waiting]}))[0] == 200
    await comfy.post("/interrupt", {"prompt_id": running})
    await comfy.finish(running)
    assert (await comfy.run(turbo(seed=11, steps=1))).status == "success"
    assert await comfy.get(f"/history/{waiting}") == {}


async def test_what_the_solver_did_stands_in_the_answer_and_in_the_picture(comfy):
    result = await comfy.run(turbo(seed=18, solver="adaptive", tolerance=0.05))
    (text,) = result.outputs[SAMPLER]["text"]
    report = json.loads((await comfy.picture(result.images[0])).info["zimage_turbo"])
    assert report["solver"] == "adaptive" and report["tolerance"] == 0.05
    assert report["nfe"] < report["budget"] == 8
    assert report["sigmas"][0] == 1 and report["sigmas"][-1] == 0
    assert len(report["sigmas"]) == report["nfe"] + 1 == len(report["errors"]) + 2
    assert text.startswith(f"adaptive: {report['nfe']} of 8 evaluations")
    told = [data["value"] for data in result.told("progress") if data["node"] == SAMPLER]
    assert told == sorted(told) and told[-1] <= report["nfe"]
    assert shows_the_saved_prompt((await comfy.draw(turbo(seed=18, solver="adaptive", tolerance=0.05)))[0])


async def test_a_batch_gives_as_many_different_pictures(comfy):
    pictures = await comfy.draw(turbo(seed=12, batch_size=4))
    assert pictures.shape == (4, 256, 256, 3)
    assert len({picture.tobytes() for picture in pictures}) == 4
    assert all(shows_the_saved_prompt(picture) for picture in pictures)


async def test_width_and_height_give_a_picture_of_that_size(comfy):
    (picture,) = await comfy.draw(turbo(seed=13, width=192, height=320))
    assert picture.shape == (320, 192, 3)
    assert all(verdict(picture).shapes)


async def test_image_to_image_keeps_the_layout_of_its_picture(comfy, base):
    text = "a large yellow star"
    (given,) = await comfy.draw(turbo(seed=14, text=text))
    assert not shows_the_saved_prompt(given)
    Image.fromarray(given).save(base / "input" / "given.png")
    (kept,) = await comfy.draw(graphs.image_to_image("given.png", 15, 0.5, text))
    (fresh,) = await comfy.draw(turbo(seed=15, text=text))
    assert distance(kept, given) < 0.5 * distance(fresh, given)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference of two pictures in levels of 0..255."""
    return float(np.abs(one.astype(np.float32) - other.astype(np.float32)).mean())


@pytest.mark.parametrize("solver", ["official", "implicit", "adaptive"])
async def test_sigmas_and_solver_in_the_stock_sampler_give_the_same_pixels_as_ours(comfy, solver):
    ours = await comfy.draw(turbo(seed=16, solver=solver))
    assert np.array_equal(await comfy.draw(graphs.custom_sampler(seed=16, solver=solver)), ours)


async def test_the_stock_workflow_on_our_model_gives_the_same_pixels_as_ours(comfy):
    ours = await comfy.draw(turbo(seed=17))
    assert np.array_equal(await comfy.draw(graphs.stock(seed=17)), ours)
    assert not np.array_equal(await comfy.draw(changed(graphs.stock(seed=17), shift=1.0)), ours)
