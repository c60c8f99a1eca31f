"""Bytes behind tokens, by the tokenizers themselves: the official one, as the host has it, and the demo's."""

import unicodedata

import pytest
from comfy.text_encoders.z_image import Qwen3Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer

from zimage_turbo.engine import bilingual, catalogue
from zimage_turbo.engine.tokens import Tokenised

OFFICIAL = Qwen3Tokenizer().tokenizer
DEMO = Qwen2Tokenizer.from_pretrained(str(catalogue.DEMO_FOLDER / "tokenizer"))
each_tokenizer = pytest.mark.parametrize("tokenizer", [OFFICIAL, DEMO], ids=["official", "demo"])


def tokenised(tokenizer, text: str) -> Tokenised:
    return Tokenised.of(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


@each_tokenizer
@settings(deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"])))
def test_the_bytes_are_those_of_the_text(tokenizer, text):
    assert tokenised(tokenizer, text).data.decode() == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("一只穿着唐装的熊猫，“新年快乐”", ""),
        ("龘字", "龘"),
        ("龘龖龘", "龘龖"),
        ("墙,墙", ""),
        ("墙, 墙", "墙"),  # behind a space
        ("a red circle é", ""),
    ],
)
def test_characters_without_a_token(text, split):
    assert "".join(tokenised(OFFICIAL, text).split_characters()) == split


def test_a_space_splits_most_common_characters():
    """The 3,755 of GB 2312's first level; why a span takes the space before it."""
    rows = (bytes([row, column]) for row in range(0xB0, 0xD8) for column in range(0xA1, 0xFF))
    common = [row.decode("gb2312") for row in rows if row < b"\xd7\xfa"]
    counts = [
        sum(each in tokenised(OFFICIAL, before + each).split_characters() for each in common) for before in (", ", ",")
    ]
    assert len(common) == 3755 and counts == [3339, 2]


def test_what_the_demo_has_no_token_for():
    assert "".join(tokenised(DEMO, "写着“你好”的猫牌子").split_characters()) == "猫"


@each_tokenizer
def test_tokens_of_a_piece(tokenizer):
    known = tokenised(tokenizer, "circle, 红色的圆, 红色的圆, end")
    first, place = known.tokens_of("红色的圆")
    second, last = known.tokens_of("红色的圆", place)
    for numbers in (first, second):
        data = known.data[known.edges[numbers[0]] : known.edges[numbers[-1] + 1]]
        assert data.decode().strip() == "红色的圆"
    assert first[-1] < second[0] and known.tokens_of("红", last) is None


def test_what_is_no_text_has_no_bytes():
    known = Tokenised.of(["a", None, "<|im_end|>", "Ġb"])
    assert known.data == b"a<|im_end|> b" and known.edges == (0, 1, 1, 11, 13)


scraps = st.lists(
    st.sampled_from(
        ["[zh]", "[/zh]", "【zh】", "[ZH]", "[", "zh", "]", "“", "”", "红", "墙", " ", "龘", "cat", ",", "ｚｈ"]
    )
).map("".join)


@each_tokenizer
@settings(deadline=None)
@given(scraps)
def test_tags_never_reach_the_tokens(tokenizer, text):
    said = bilingual.read(text)
    told = tokenised(tokenizer, said.prompt).data.decode()
    assert not said.tagged or not bilingual.read(told).tagged
    for tag in ("[zh]", "[/zh]", "【zh】", "[ZH]"):
        assert tag not in told


@each_tokenizer
@pytest.mark.parametrize("content", ["新年快乐", "２０２６，你好", "[A]B c", "龘", "①²ﬁ", "OPEN"])
def test_what_is_quoted_reaches_the_tokens_to_the_letter(tokenizer, content):
    said = bilingual.read(f"a cat, [zh]ＡＢ，写着“{content}”的牌子[/zh]")
    assert f'"{content}"' in tokenised(tokenizer, said.prompt).data.decode()
