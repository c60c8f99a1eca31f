"""[zh] tags and several prompts over the API, by our sampler and the host's."""

import json

import numpy as np

from . import graphs
from .graphs import PROMPT, SAMPLER, turbo
from .sight import shows_the_bilingual_prompt, shows_the_saved_prompt

ONE_LEVEL = 1  # of 255: what rounding may move a colour by, as products are summed in another order in another batch
BILINGUAL = graphs.SAVED.with_name("Z-Image-Turbo_Bilingual.json")


def assert_same_up_to_rounding(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= ONE_LEVEL


async def test_the_saved_workflow_draws_what_both_languages_say(comfy):
    graph = json.loads(BILINGUAL.read_text(encoding="utf-8"))
    result = await comfy.run(graph)
    assert shows_the_bilingual_prompt(np.asarray(await comfy.picture(result.images[0])))
    (shown,) = result.outputs[PROMPT]["text"]
    assert "tokens of 512" in shown and 'To be drawn: "新年快乐"' in shown


async def test_a_mistyped_tag_is_told_and_the_picture_drawn(comfy):
    text = json.loads(BILINGUAL.read_text(encoding="utf-8"))[PROMPT]["inputs"]["text"]
    result = await comfy.run(turbo(text=text.replace("[zh]", "【ZH】").replace("[/zh]", "")))
    assert shows_the_bilingual_prompt(np.asarray(await comfy.picture(result.images[0])))
    (shown,) = result.outputs[PROMPT]["text"]
    assert "【ZH】 is read as [zh]" in shown and "has no [/zh]" in shown


SIGN = "a sign that says OPEN, two large purple hearts beside it, [zh]右边写着“新年快乐”，还有一颗黄色的星星[/zh]"


async def test_each_line_draws_what_it_draws_alone(comfy):
    """One batch: each prompt from the noise of its place in it."""
    said = graphs.saved()[PROMPT]["inputs"]["text"]
    lines = (said, SIGN, "[zh]一颗黄色的星星[/zh]")
    together = await comfy.draw(turbo(text="\n".join(lines), one_per_line=True, seed=5, steps=4))
    alone = []
    for place, text in enumerate(lines):
        graph = turbo(text=text, seed=5, steps=4)
        graph["6"] = graphs.node("EmptySD3LatentImage", width=256, height=256, batch_size=len(lines))
        graph["7"] = graphs.node("LatentFromBatch", samples=["6", 0], batch_index=place, length=1)
        graph[SAMPLER]["inputs"]["latent_image"] = ["7", 0]
        alone += list(await comfy.draw(graph))
    assert_same_up_to_rounding(together, np.stack(alone))
    assert shows_the_saved_prompt(together[0]) and not shows_the_saved_prompt(together[2])


async def test_several_pictures_of_each_line(comfy):
    said = graphs.saved()[PROMPT]["inputs"]["text"]
    drawn = await comfy.draw(turbo(text=f"{said}\n{SIGN}", one_per_line=True, batch_size=2, seed=5, steps=4))
    assert [shows_the_saved_prompt(picture) for picture in drawn] == [True, True, False, False]


def hosts_sampler(text: str, batch_size: int) -> graphs.Graph:
    """One prompt a line in the stock KSampler, from an empty latent of so many."""
    graph = graphs.stock(seed=5)
    graph[PROMPT]["class_type"] = "ZImageTurboTextEncode"
    graph["8"]["inputs"]["batch_size"] = batch_size
    graph[SAMPLER]["inputs"]["steps"] = 4
    return graphs.changed(graph, text=text, one_per_line=True)


async def test_the_hosts_sampler_draws_each_line(comfy):
    said = graphs.saved()[PROMPT]["inputs"]["text"]
    expected = await comfy.draw(turbo(text=f"{said}\n{SIGN}", one_per_line=True, seed=5, steps=4))
    assert_same_up_to_rounding(await comfy.draw(hosts_sampler(f"{said}\n{SIGN}", 2)), expected)


async def test_the_hosts_sampler_leaves_no_line_out_silently(comfy):
    result = await comfy.run(hosts_sampler("a red circle\na blue square", 1))
    assert result.status == "error"
    assert "holds 2 prompts, but the latent batch is 1" in result.error["exception_message"]
