"""[zh] tags: read as meant, never seen by the model; Chinese brought into form; what is quoted kept to the letter."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_turbo.engine import bilingual, chinese
from zimage_turbo.engine.bilingual import CHINESE, OTHER, read

EXAMPLE = (
    "Chinese ink painting, a panda wearing a Tang suit standing on the Great Wall, "
    "[zh]一只穿着唐装的熊猫，站在长城上，水墨风格[/zh]"
)
# What a reader takes for a tag; written anew, not the parser's.
LEAK = re.compile(r"[\[［【〔〖<＜](?:\s*[/／\\])?\s*[zZｚＺ][hHｈＨ](?:\s*[/／\\])?\s*[\]］】〕〗>＞]")
TAGS = [
    "[zh]",
    "[/zh]",
    "[ZH]",
    "【zh】",
    "【/zh】",
    "［ｚｈ］",
    "</zh>",
    "[zh",
    "[ zh ]",
    "[/ zh]",
    "[zh/]",
    "zh",
    "a",
]
SCRAPS = (*TAGS, *TAGS[:2], *"[]zh/／【＜>﹇“”‘’「」『』《》\"'＂1红圆 \u3000\n,，.。a\\(龘é\u200d👩{}")
scraps = st.lists(st.sampled_from(SCRAPS), max_size=30).map("".join)
MARKS = "“”‘’「」『』《》〝〞﹁﹂﹃﹄︽︾｢｣\"＂'"
BRACKETS = "[［【〔〖<＜﹇︻︗︹﹝﹤"
quotable = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters=MARKS + BRACKETS), max_size=12)
unmarked = scraps.filter(lambda text: not set(text) & set(MARKS + BRACKETS))


def test_the_example():
    said = read(EXAMPLE)
    assert [segment.language for segment in said.segments] == [OTHER, CHINESE]
    assert said.segments[1].text == "一只穿着唐装的熊猫，站在长城上，水墨风格"
    assert said.prompt == EXAMPLE.replace(" [zh]", "").replace("[/zh]", "")
    assert said.tagged and not said.notices and not said.drawn


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a red circle",
        "写着“你好”的牌子，ＡＢＣ",
        'a 5" pipe, "OPEN"',
        "[zhejiang] [zh-CN] [z h] [en]x[/en]",
        "zh",
    ],
)
def test_without_tags_nothing_changes(text):
    said = read(text)
    assert said.segments == (bilingual.Segment(OTHER, text),)
    assert not said.tagged and not said.notices


MISTYPED = [
    ("[ZH]红[/ZH]", "红", ["[ZH] is read as [zh]", "[/ZH] is read as [/zh]"]),
    ("[Zh]红[/zH]", "红", ["[Zh] is read as [zh]", "[/zH] is read as [/zh]"]),
    ("【zh】红【/zh】", "红", ["【zh】 is read as [zh]", "【/zh】 is read as [/zh]"]),
    ("［ｚｈ］红［／ｚｈ］", "红", ["is read as [zh]", "is read as [/zh]"]),
    ("[zh   ]红[  /  zh]", "红", ["[zh   ] is read as [zh]", "[  /  zh] is read as [/zh]"]),
    ("[ zh ]红[ / zh ]", "红", ["[ zh ] is read as [zh]", "[ / zh ] is read as [/zh]"]),
    ("<zh>红</zh>", "红", ["<zh> is read as [zh]", "</zh> is read as [/zh]"]),
    ("[zh]红[\\zh]", "红", ["is read as [/zh]"]),
    ("[zh]红[zh/]", "红", ["[zh/] is read as [/zh]"]),
    ("[zh 红[/zh", "红", ["[zh is read as [zh]", "[/zh is read as [/zh]"]),
    ("[zh]红", "红", ["at position 0: [zh] has no [/zh]: the span goes on to the end; write [/zh] behind"]),
    ("红[/zh]", "红", ["at position 1: [/zh] has no [zh] before it and is left out"]),
    ("[zh]红[zh]圆[/zh]环[/zh]", "红圆环", ["at position 5: [zh] stands in a [zh] span and is left out"]),
    ("[zh]红[zh], a cat", "红, a cat", ["at position 5: [zh] is read as [/zh]: a [zh] span is open"]),
    ("[zh]红 a [zh]圆[/zh]", "红 a圆", ["[zh] has no [/zh]: the span ends where the next one begins"]),
    ("[zh]写着“你好[/zh]", "写着“你好", ["at position 6: “ has no partner"]),
    ('[zh]写着“他说"你好"”[/zh]', '写着"他说"你好""', ['at position 6: “他说"你好"” has double quotes within']),
]


@pytest.mark.parametrize(("text", "prompt", "says"), MISTYPED, ids=[case[0] for case in MISTYPED])
def test_a_mistyped_tag_is_read_and_named(text, prompt, says):
    said = read(text)
    assert said.prompt == prompt
    assert len(said.notices) == len(says)
    for notice, words in zip(said.notices, says, strict=True):
        assert words in str(notice)
        assert text[notice.place :].startswith(notice.found)


JOINED = [
    ("a[zh]b[/zh]c", "a b c"),
    ("wall[zh]墙[/zh]wall", "wall墙wall"),
    ("wall, [zh] 墙 [/zh], end", "wall,墙, end"),
    ("wall,\n [zh]墙[/zh]", "wall,\n墙"),
    ("wall, [zh]“墙”[/zh]", 'wall, "墙"'),
    ("[zh]墙[/zh] [zh]门[/zh]", "墙门"),
    ("a[zh][/zh]b", "a b"),
    ("[[zh]zh]红[/zh]", "[, zh]红"),
    ("[z[zh]h]红[/zh]", "[z h]红"),
    ("[/[zh]zh]红[/zh]", "[/, zh]红"),
    ("[" + " " * 30 + "[/zh]zh]", "[" + " " * 30 + ", zh]"),
]


@pytest.mark.parametrize(("text", "prompt"), JOINED)
def test_where_a_tag_stood(text, prompt):
    assert read(text).prompt == prompt


QUOTED = [
    ("写着“新年快乐”的牌子", '写着"新年快乐"的牌子', ["新年快乐"]),
    ("写着「２０２６，好」", '写着"２０２６，好"', ["２０２６，好"]),
    ("『你好』", '"你好"', ["你好"]),
    ("｢你好｣", '"你好"', ["你好"]),
    ("一本《红楼梦》", '一本"红楼梦"', ["红楼梦"]),
    ('"Ａ","ｂ"', '"Ａ"，"ｂ"', ["Ａ", "ｂ"]),
    ("'你好', it's", '"你好", it\'s', ["你好"]),
    ("＂你好＂", '"你好"', ["你好"]),
    ("‘你好’", '"你好"', ["你好"]),
    ("it’s “OK”", 'it’s "OK"', ["OK"]),
    ("「他说『你好』」", '"他说『你好』"', ["他说『你好』"]),
    ("“a“b”c”", '"a“b”c"', ["a“b”c"]),
    ("“”", '""', []),
]


@pytest.mark.parametrize(("span", "prompt", "drawn"), QUOTED)
def test_text_to_be_drawn_stands_in_straight_quotes(span, prompt, drawn):
    said = read(f"[zh]{span}[/zh]")
    assert said.prompt == prompt
    assert list(said.drawn) == drawn and not said.notices


def test_quotes_around_a_tag_hold_it():
    """Words to be drawn in an English sentence are no span of their own, and are not folded."""
    said = read('a sign that says "[zh]你好１２[/zh]" in blue')
    assert said.segments == (bilingual.Segment(OTHER, 'a sign that says "你好１２" in blue'),)
    assert said.drawn == ("你好１２",) and said.tagged
    assert read("says “[zh]你好[/zh]”, a “cat”").prompt == 'says "你好", a “cat”'


def test_outside_of_tags_quotations_are_seen_but_not_changed():
    said = read('写着"你好"的牌子，says"OPEN", a “cat”, 「红」')
    assert said.drawn == ("你好", "OPEN", "cat") and not said.tagged


def test_a_measure_is_no_quotation():
    said = read('a 5" pipe, [zh]写着“１号”，２米[/zh], a 6" pipe')
    assert said.prompt == 'a 5" pipe,写着"１号"，2米, a 6" pipe'


KEPT = "x²₂①½ﬁ㎡㏒℃™Ⅳ…～㈱ｱ，！？：；（）。、é"
FOLDED = [
    ("ＡＢＣ１２３％＋", "ABC123%+"),
    ("红\u3000圆", "红，圆"),
    ("⼤⻳\uf900", "大龟豈"),
    ("﹐︰︵红︶", "，︰（红）"),
    ("｡､", "。、"),
    ("红,绿;蓝:黄!紫?白.", "红，绿；蓝：黄！紫？白。"),
    ("红 , 绿", "红，绿"),
    ("T恤 红 cat 圆", "T恤，红 cat圆"),
    ("3.5米,A,b 1:2", "3.5米,A,b 1:2"),
    (KEPT, KEPT),
]


@pytest.mark.parametrize(("typed", "form"), FOLDED)
def test_chinese_outside_of_quotes_takes_one_form(typed, form):
    assert chinese.folded(typed) == form
    assert chinese.folded(form) == form


def test_segments_apart():
    said = read("a cat, [zh]红色，[/zh], on a wall; [zh]写着“门”[/zh].")
    assert [(segment.language, segment.text) for segment in said.apart()] == [
        (OTHER, "a cat, on a wall, ."),
        (CHINESE, "红色"),
        (CHINESE, '写着"门"'),
    ]


@settings(deadline=None)
@given(scraps)
def test_any_text_is_read(text):
    said = read(text)
    assert not said.tagged or not LEAK.search(said.prompt)
    assert not any(LEAK.search(segment.text) for segment in said.apart() if said.tagged)
    assert not read(said.prompt).tagged or not said.tagged
    assert said.tagged or said.prompt == text
    for notice in said.notices:
        assert 0 <= notice.place < len(text) and str(notice)


@settings(deadline=None)
@given(quotable.filter(str.strip), st.sampled_from(["“”", "「」", "『』", "《》", '""', "＂＂"]), unmarked)
def test_what_is_quoted_stays_to_the_letter(content, marks, around):
    said = read(f"a cat, [zh]{around}{marks[0]}{content}{marks[1]}{around}[/zh]")
    assert said.drawn == (content,)
    assert f'"{content}"' in said.prompt


def test_a_hundred_thousand_texts():
    """No crash, and no tag in what the model is told."""
    rng = random.Random(4)
    for _ in range(100_000):
        text = "".join(rng.choices(SCRAPS, k=rng.randrange(24)))
        said = read(text)
        assert not said.tagged or not LEAK.search(said.prompt), text


LONG = (
    *("[zh]" * 25_000, "[/zh]" * 20_000, "[z" * 20_000 + "[zh]" + "h]" * 20_000, "[" * 100_000, "[ " * 50_000 + "[zh]"),
    *("“" * 50_000 + "[zh]" + "”" * 50_000, '"' * 100_000 + "[zh]", "[zh]" + '"' * 100_000, "[zh]“红”[/zh]" * 10_000),
    *("[" + " " * 100_000 + "[zh]", "[zh]“" * 20_000, "[zh]红" + " " * 100_000 + "a" + " " * 100_000),
)


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:12])
def test_long_texts_of_nothing_but_marks(text):
    """In time proportional to their length: squared, one of these would take minutes."""
    assert not LEAK.search(read(text).prompt)
