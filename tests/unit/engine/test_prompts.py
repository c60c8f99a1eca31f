"""Prompts with [zh] tags as CONDITIONING: in one context or in segments, weighed, and reported on."""

import pytest
import torch

import nodes as host_nodes
from zimage_turbo.engine import prompts, text
from zimage_turbo.engine.prompts import ONE_CONTEXT, OWN_SEGMENTS, SPANS
from zimage_turbo.tests.comparison import relative_error

TAGGED = "a large red circle, [zh]蓝色的方块，写着“你好”[/zh], white background"
PLAIN = TAGGED.replace(" [zh]", "").replace("[/zh]", "").replace("“", '"').replace("”", '"')


@pytest.fixture
def clip(demo):
    return demo[1]


def states(encoded) -> torch.Tensor:
    ((only, extra),) = encoded[0] if isinstance(encoded, tuple) else encoded
    assert extra["attention_mask"].shape == only.shape[:2] and extra["attention_mask"].all()
    return only


def fresh(clip, prompt: str) -> torch.Tensor:
    """As the host itself encodes it, nothing remembered."""
    return clip.encode_from_tokens(clip.tokenize(prompt))


@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize(
    "prompt", ["a red circle", "写着“你好”的牌子，Ａ", 'a sign "OPEN", 一颗星', "[zhejiang]", "x (y:1.3)"]
)
def test_without_tags_all_is_as_it_was(clip, prompt, spans):
    encoded, report = prompts.encode(clip, prompt, spans, zh_weight=0.3)
    assert torch.equal(states(encoded), fresh(clip, prompt))
    assert torch.equal(states(encoded), states(text.encode(clip, prompt)))
    assert report.sent == (prompt,) and not report.notices


def test_the_hosts_own_node_still_reads_tags_as_words(clip):
    ((theirs, _),) = host_nodes.CLIPTextEncode().encode(clip, TAGGED)[0]
    assert torch.equal(theirs, fresh(clip, TAGGED))
    assert theirs.shape[1] > states(prompts.encode(clip, TAGGED)).shape[1]


def test_one_context(clip):
    encoded, report = prompts.encode(clip, TAGGED)
    assert torch.equal(states(encoded), fresh(clip, PLAIN))
    assert report.sent == (PLAIN,) and report.drawn == ("你好",)
    assert report.tokens == states(encoded).shape[1]


def test_segments_of_their_own(clip):
    encoded, report = prompts.encode(clip, TAGGED, OWN_SEGMENTS)
    parts = ("a large red circle, white background", '蓝色的方块，写着"你好"')
    assert report.sent == parts
    assert torch.equal(states(encoded), torch.cat([fresh(clip, part) for part in parts], 1))
    assert report.tokens == states(encoded).shape[1]


def test_punctuation_alone_is_one_context(clip):
    _, report = prompts.encode(clip, "[zh]，[/zh]", OWN_SEGMENTS)
    assert report.sent == ("，",)


@pytest.mark.parametrize("spans", SPANS)
def test_weight(clip, spans):
    """0: blanks in the place of the Chinese; 1: to the bit as without; between and beyond: on one line."""
    at = {weight: states(prompts.encode(clip, TAGGED, spans, weight)) for weight in (0.0, 0.5, 1.0, 1.5)}
    assert torch.equal(at[1.0], states(prompts.encode(clip, TAGGED, spans)))
    other = TAGGED.replace("蓝", "红")
    assert torch.equal(at[0.0], states(prompts.encode(clip, other, spans, 0.0)))
    assert relative_error(at[0.5], (at[0.0] + at[1.0]) / 2) < 1e-6
    assert relative_error(at[1.5], at[1.0] + (at[1.0] - at[0.0]) / 2) < 1e-6
    untouched = slice(0, len(clip.tokenize("a large red circle")["qwen3_4b"][0]) - 5)
    assert torch.equal(at[0.0][:, untouched], at[1.0][:, untouched])


def test_a_weight_passes_the_caption_embedder_but_a_scale_does_not(demo):
    """The embedder begins with an RMS norm, which undoes a scale."""
    model, clip, _ = demo
    embed = model.model.diffusion_model.cap_embedder
    dtype = next(embed.parameters()).dtype
    half, whole = (states(prompts.encode(clip, TAGGED, zh_weight=weight)).to(dtype) for weight in (0.5, 1.0))
    assert relative_error(embed(whole * 0.5), embed(whole)) < 1e-3
    assert relative_error(embed(half), embed(whole)) > 0.05


def test_several_spans_are_blanked_each(clip):
    both = [states(prompts.encode(clip, f"[zh]红[/zh] cat [zh]{last}[/zh]", ONE_CONTEXT, 0.0)) for last in "圆红"]
    assert torch.equal(*both)


def test_a_weight_needs_words(clip, monkeypatch):
    with pytest.raises(ValueError, match=r"zh_weight cannot weigh 'a\\\\\(红'.*set zh_weight to 1"):
        prompts.encode(clip, "[zh]a\\(红[/zh]", zh_weight=0.5)
    monkeypatch.setattr(clip, "tokenize", lambda *_, **__: {"l": [[(1, 1.0)]], "g": [[(1, 1.0)]]})
    with pytest.raises(ValueError, match=r"zh_weight needs the text encoder of Z-Image.*clip has l, g"):
        prompts.encode(clip, "[zh]红[/zh]", zh_weight=0.5)


@pytest.mark.parametrize("prompt", ["", " \n", "[zh][/zh]", "[zh] [/zh]", "[/zh]"])
def test_nothing_to_draw(clip, prompt):
    with pytest.raises(ValueError, match="text is empty"):
        prompts.encode(clip, prompt)


@pytest.mark.parametrize("spans", SPANS)
def test_too_long(clip, spans):
    with pytest.raises(ValueError, match=r"at most 1,504"):
        prompts.encode(clip, f"{'红' * 1000}[zh]{'红' * 1000}[/zh]", spans)


def test_the_report_says_what_became_of_the_prompt(clip):
    prompt = "a cat, [ZH]写着“龘１”的猫，ｘ[/zh]"
    _, report = prompts.encode(clip, prompt)
    assert report.split == ("龘", "１", "猫")
    assert str(report).splitlines() == [
        f"{report.tokens} tokens of 512",
        'Sent: a cat,写着"龘１"的猫，x',
        'To be drawn: "龘１"',
        "Split into bytes, likely drawn wrong: 龘 (U+9F98), １ (U+FF11, usually 1), 猫 (U+732B)",
        "Warning at position 7: [ZH] is read as [zh]; write [zh].",
    ]


def test_the_report_of_a_long_prompt(clip, caplog):
    _, report = prompts.encode(clip, "[zh]" + "红" * 600 + "[/zh]")
    assert f"tokens of 512: the last {report.tokens - 512} are beyond" in str(report)
    assert "was trained on 512" in caplog.text


def test_the_report_stays_short(clip):
    _, report = prompts.encode(clip, "红" + "[/zh]" * 400 + "".join(map(chr, range(0x9F00, 0x9F80))))
    assert "388 more of this kind" in str(report) and "more\n" in str(report)
    assert len(str(report)) < 3000


def test_one_prompt_a_line():
    assert prompts.lines("a\n\n  \n b \r\n") == ["a", " b \r"]
    assert prompts.lines(" \n") == [" \n"]
