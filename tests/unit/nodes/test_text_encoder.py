"""The node: one prompt or one a line, each as long as it is, and what it shows."""

import pytest
import torch

import nodes as host_nodes
from zimage_turbo.engine import ode, progress, prompt_batch, prompts, sampling, text
from zimage_turbo.nodes.text_encoder import ZImageTurboTextEncode

PROMPTS = ["a red circle", "[zh]写着“新年快乐”的牌子[/zh]", "two large purple hearts, mint background, on a small sign"]


def states(conditioning) -> torch.Tensor:
    ((only, _),) = conditioning
    return only


def encode(demo, prompt: str, **options):
    (encoded,), shown = (output := ZImageTurboTextEncode.execute(demo[1], prompt, **options)).args, output.ui.value
    return encoded, shown


@pytest.mark.parametrize("one_per_line", [False, True])
def test_one_prompt(demo, one_per_line):
    """As the engine encodes it: nothing is added that other samplers would have to know."""
    prompt = "a red circle and a blue square" if one_per_line else "a red circle\nand a blue square"
    encoded, shown = encode(demo, prompt, one_per_line=one_per_line)
    ((expected, extra),) = text.encode(demo[1], prompt)
    assert torch.equal(states(encoded), expected) and encoded[0][1].keys() == extra.keys()
    assert f"Sent: {prompt}" in shown


@pytest.mark.parametrize("options", [{}, {"spans": prompts.OWN_SEGMENTS, "zh_weight": 0.7}], ids=["plain", "options"])
def test_one_prompt_a_line(demo, options):
    """One conditioning, whose rows are what each prompt is alone: of its own length, with nothing of the others."""
    encoded, shown = encode(demo, "\n\n".join(PROMPTS), one_per_line=True, **options)
    assert states(encoded).shape[0] == 3
    rows, alone = prompt_batch.split(encoded), [prompts.encode(demo[1], each, **options) for each in PROMPTS]
    assert len({states(each).shape[1] for each in rows}) == 3
    for one, (other, report) in zip(rows, alone, strict=True):
        assert torch.equal(states(one), states(other))
        assert one[0][1]["attention_mask"].all()
        assert str(report) in shown


@pytest.mark.parametrize("spans", prompts.SPANS)
def test_the_hosts_sampler_takes_what_comes(demo, spans):
    """Ours and the stock KSampler draw the same from it."""
    encoded, _ = encode(demo, PROMPTS[1], spans=spans, zh_weight=0.8)
    start = sampling.empty_latent(demo[0], 192, 192, 1)
    ours = sampling.sample(demo[0], encoded, start, 1, ode.sigmas())["samples"]
    (theirs,) = host_nodes.KSampler().sample(demo[0], 1, 8, 1.0, "euler", "simple", encoded, encoded, start, 1.0)
    assert torch.equal(ours, theirs["samples"])


def test_a_bad_line_fails(demo):
    with pytest.raises(ValueError, match="text is empty"):
        encode(demo, " \n ", one_per_line=True)


def test_what_it_shows_stands_on_the_node(demo, monkeypatch):
    told = []
    monkeypatch.setattr(progress, "show", told.append)
    _, shown = encode(demo, "[ZH]红[/zh]")
    assert told == [shown] and "[ZH] is read as [zh]" in shown


def test_an_error_names_the_prompt_of_several(demo):
    with pytest.raises(ValueError, match=r"^prompt 2 of 3: text has the control character U\+0007 at position 6"):
        encode(demo, "a red circle\na blue\x07 square\na green star", one_per_line=True)
    with pytest.raises(ValueError, match=r"^text has the control character"):
        encode(demo, "a blue\x07 square", one_per_line=True)
