"""Prompts to conditioning: no padding, and clear words for prompts that cannot be encoded."""

import pytest
import torch

from zimage_turbo.engine import text


@pytest.mark.parametrize("prompt", ["a red circle", "一颗黄色的星星", 'a sign that says "你好"', "x" * 300])
def test_states_are_as_long_as_the_tokens(demo, prompt):
    clip = demo[1]
    (states, extra), *others = text.encode(clip, prompt)
    count = len(clip.tokenize(prompt)["qwen3_4b"][0])
    assert not others
    assert states.shape == (1, count, 256) and torch.isfinite(states).all()
    assert extra["attention_mask"].shape == (1, count) and extra["attention_mask"].all()


def test_padding_is_cut_off():
    states, mask = torch.arange(12.0).reshape(1, 4, 3), torch.tensor([[1, 1, 0, 0]])
    kept, extra = text._trim(states, {"attention_mask": mask, "pooled_output": None})
    assert torch.equal(kept, states[:, :2]) and extra["attention_mask"].tolist() == [[1, 1]]


@pytest.mark.parametrize("prompt", ["", "  \n\t "])
def test_nothing_to_draw(demo, prompt):
    with pytest.raises(ValueError, match="text is empty"):
        text.encode(demo[1], prompt)


@pytest.mark.parametrize(("prompt", "code"), [("a\x00b", "U+0000"), ("\x1b[31mred", "U+001B"), ("x\ud800", "U+D800")])
def test_control_characters_are_named(demo, prompt, code):
    with pytest.raises(ValueError, match=rf"{code.replace('+', '[+]')} at position"):
        text.encode(demo[1], prompt)


def test_emoji_line_breaks_and_joiners_are_no_control_characters(demo):
    assert torch.isfinite(text.encode(demo[1], "a red circle\n👩‍🚀\tok")[0][0]).all()


def test_too_long(demo):
    with pytest.raises(ValueError, match=r"100,000 characters.*at most 1,504"):
        text.encode(demo[1], "红" * 100_000)


def test_more_than_recommended_is_said(demo, caplog):
    text.encode(demo[1], "红" * 600)
    assert "was trained on 512" in caplog.text
