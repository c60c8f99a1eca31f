"""[zh] tags and several prompts over the API, by our sampler and the host's."""

import json

import numpy as np

from . import graphs
from .graphs import PROMPT, SAVE, turbo
from .sight import shows_the_bilingual_prompt, shows_the_saved_prompt

BILINGUAL = graphs.SAVED.with_name("Z-Image-Turbo_Bilingual.json")


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


async def test_each_line_draws_what_it_draws_alone(comfy):
    said = graphs.saved()[PROMPT]["inputs"]["text"]
    other = "[zh]一颗黄色的星星[/zh]"
    both = await comfy.draw(turbo(text=f"{said}\n{other}", one_per_line=True, seed=5, steps=4))
    alone = [(await comfy.draw(turbo(text=text, seed=5, steps=4)))[0] for text in (said, other)]
    assert np.array_equal(both, np.stack(alone))
    assert shows_the_saved_prompt(both[0]) and not shows_the_saved_prompt(both[1])


async def test_the_hosts_sampler_draws_each_line(comfy):
    graph = graphs.stock(seed=5)
    graph[PROMPT]["class_type"] = "ZImageTurboTextEncode"
    graph[PROMPT]["inputs"] |= {"text": "a red circle\na sign that says OPEN, white background", "one_per_line": True}
    result = await comfy.run(graph)
    assert result.status == "success" and len(result.outputs[SAVE]["images"]) == 2
