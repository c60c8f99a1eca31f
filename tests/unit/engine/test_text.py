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


def test_a_prompt_is_encoded_once_for_the_same_weights(demo, monkeypatch):
    clip = demo[1].clone()
    calls, encode = [], type(clip).encode_from_tokens_scheduled
    monkeypatch.setattr(type(clip), "encode_from_tokens_scheduled", lambda *a: calls.append(1) or encode(*a))
    first = text.encode(clip, "a blue ring, seen twice")
    first[0][1]["added"] = True
    again = text.encode(clip.clone(), "a blue ring, seen twice")
    assert len(calls) == 1 and torch.equal(again[0][0], first[0][0]) and "added" not in again[0][1]
    changed = clip.clone()
    name = "qwen3_4b.transformer.model.layers.0.mlp.up_proj.weight"
    changed.add_patches({name: (torch.full((512, 256), 0.1),)}, 1.0)
    assert not torch.equal(text.encode(changed, "a blue ring, seen twice")[0][0], first[0][0])
    text.encode(clip, "another")
    assert len(calls) == 3
    for turn in range(text.KEPT_PROMPTS):
        text.encode(clip, f"prompt {turn}")
    assert len(clip.patcher.get_attachment(text.EMBEDDINGS).values) == text.KEPT_PROMPTS
