"""Prompts in two languages: `[zh]…[/zh]` marks what is Chinese.

The tags never reach the model. A tagged span is written as Chinese captions are (`chinese.folded`), and what it quotes
to be drawn goes verbatim into the straight double quotes that the model was trained with. What stands outside of tags
stays as it is, so that a prompt without tags is what it was. A mistyped tag is read in the likeliest way, with a
notice; no text is an error here.
"""

import itertools
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from . import chinese
from .quotes import quotations

CHINESE, OTHER = "zh", "en"
_OPEN, _SLASH, _CLOSE = (f"[{chinese.variants(each)}]" for each in ("[【〔〖<", "/\\", "]】〕〗>"))
_ZH = f"[{chinese.variants('zZ')}][{chinese.variants('hH')}]"
# The closing bracket may be forgotten; [zhejiang] and [zh-CN] are no tags.
_TAG = re.compile(rf"{_OPEN}(?P<before>\s*{_SLASH})?\s*{_ZH}(?P<after>\s*{_SLASH})?(?:\s*{_CLOSE}|(?![A-Za-z0-9_-]))")
_SPACES = re.compile(r"\s+")
_BLANK = re.compile(r"[^\S\r\n]")
_LONGEST = 12  # characters of a tag, and more, where white space is one
_EDGES = " \t,，、;；"  # between segments that are encoded each for itself


@dataclass(frozen=True)
class Notice:
    """Something in the prompt that is not taken as written: what was found, where (index of its first character, from
    0), how it is read, and what to write instead."""

    place: int
    found: str
    reading: str
    write: str

    def __str__(self) -> str:
        return f"at position {self.place}: {self.found} {self.reading}; write {self.write}."


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt. language: CHINESE for a tagged span, OTHER for what stands outside of tags."""

    language: str
    text: str


@dataclass(frozen=True)
class Bilingual:
    """A prompt that was read. segments: in reading order, joined as one context they are `prompt`; drawn: what is
    quoted, each text as it is to be drawn; tagged: whether there were tags at all."""

    segments: tuple[Segment, ...]
    drawn: tuple[str, ...]
    notices: tuple[Notice, ...]
    tagged: bool

    @property
    def prompt(self) -> str:
        return "".join(segment.text for segment in self.segments)

    def apart(self) -> tuple[Segment, ...]:
        """Segments that stand each for themselves: all that is not Chinese joined, and every span."""
        trimmed = [Segment(each.language, each.text.strip().strip(_EDGES)) for each in self.segments]
        other = ", ".join(each.text for each in trimmed if each.language == OTHER and each.text)
        first = (Segment(OTHER, other),) if other else ()
        return first + tuple(each for each in trimmed if each.language == CHINESE and each.text)


@dataclass(frozen=True)
class _Tag:
    start: int
    end: int
    written: str
    closes: bool

    @property
    def name(self) -> str:
        return "[/zh]" if self.closes else "[zh]"


def read(text: str) -> Bilingual:
    """A prompt as it was typed → what the model is to be told. Takes time in proportion to the text's length."""
    tags = [
        _Tag(match.start(), match.end(), match[0], bool(match["before"] or match["after"]))
        for match in _TAG.finditer(text)
    ]
    if not tags:
        found, _ = quotations(text, [None] * len(text))
        return Bilingual((Segment(OTHER, text),), _drawn(text, found), (), False)
    notices = [
        Notice(tag.start, tag.written, f"is read as {tag.name}", tag.name) for tag in tags if tag.written != tag.name
    ]
    spans, misplaced = _spans(tags)
    joined, spans, places = _without_tags(text, tags, spans)
    found, unpaired = quotations(joined, spans)
    notices += misplaced + _quote_notices(joined, places, spans, found, unpaired)
    segments = tuple(_segments(joined, spans, found))
    return Bilingual(segments, _drawn(joined, found), tuple(sorted(notices, key=lambda each: each.place)), True)


def _spans(tags: list[_Tag]) -> tuple[list[int | None], list[Notice]]:
    """The number of the Chinese span that each stretch of text before, between and behind the tags lies in, None
    outside; and what was wrong with the order of the tags."""
    partners, waiting = {}, []
    for number, tag in enumerate(tags):
        if not tag.closes:
            waiting.append(number)
        elif waiting:
            partners[waiting.pop()] = number
    spans: list[int | None] = [None]
    notices, opened = [], None
    closing = set(partners.values())
    for number, tag in enumerate(tags):
        if tag.closes:
            if number not in closing:
                notices.append(Notice(tag.start, tag.written, "has no [zh] before it and is left out", "[zh]…[/zh]"))
            elif partners.get(opened) == number:
                opened = None
        elif opened is None:
            opened = number
        elif opened in partners:
            notices.append(Notice(tag.start, tag.written, "stands in a [zh] span and is left out", "one [zh]…[/zh]"))
        elif number in partners:
            notices.append(_unclosed(tags[opened], "ends where the next one begins"))
            opened = number
        else:
            notices.append(Notice(tag.start, tag.written, "is read as [/zh]: a [zh] span is open", "[/zh]"))
            opened = None
        spans.append(opened)
    if opened is not None and opened not in partners:
        notices.append(_unclosed(tags[opened], "goes on to the end"))
    return spans, notices


def _unclosed(tag: _Tag, reading: str) -> Notice:
    return Notice(tag.start, tag.written, f"has no [/zh]: the span {reading}", "[/zh] behind the Chinese")


def _without_tags(text: str, tags: list[_Tag], spans: list[int | None]) -> tuple[str, list[int | None], list[int]]:
    """The text without its tags; for every character its span and its place in `text`.

    White space at the edges of a span belongs to the tags. So do spaces before a span that begins with a Chinese
    character: behind a space Qwen's tokenizer splits nine in ten of the common ones into bytes.
    """
    edges = [0, *(edge for tag in tags for edge in (tag.start, tag.end)), len(text)]
    characters: list[str] = []
    owners: list[int | None] = []
    places: list[int] = []
    tail = ""
    for start, end, span in zip(edges[::2], edges[1::2], spans, strict=True):
        if span is not None:
            start += len(text[start:end]) - len(text[start:end].lstrip())
            end = start + len(text[start:end].rstrip())
        if start == end:
            continue
        stretch = text[start:end]
        if span is not None and chinese.is_ideograph(stretch[0]):
            while characters and _BLANK.match(characters[-1]):
                del characters[-1], owners[-1], places[-1]
            tail = tail.rstrip()
        even = _SPACES.sub(" ", stretch)
        joint = _joint(tail, even[:_LONGEST])
        characters += joint + stretch
        owners += [span if owners[-1:] == [span] else None] * len(joint) + [span] * len(stretch)
        places += [start] * len(joint) + list(range(start, end))
        tail = (tail + joint + even)[-_LONGEST:]
    return "".join(characters), owners, places


def _joint(left: str, right: str) -> str:
    """What stands where a tag stood: a space between words of letters, nothing beside Chinese."""
    words = all(each.isalnum() and not chinese.is_ideograph(each) for each in (left[-1:], right[0]))
    joint = " " if words else ""
    formed = _TAG.search(left + joint + right)
    return ", " if formed and formed.start() < len(left) else joint


def _quote_notices(
    text: str, places: list[int], spans: list[int | None], found: list[tuple[int, int]], unpaired: list[int]
) -> list[Notice]:
    notices = [Notice(places[mark], text[mark], "has no partner and quotes nothing", "both marks") for mark in unpaired]
    return notices + [
        Notice(places[first], text[first : last + 1], "has double quotes within quotes", "one pair of quotes")
        for first, last in found
        if spans[first] is not None and '"' in text[first + 1 : last]
    ]


def _segments(text: str, spans: list[int | None], found: list[tuple[int, int]]) -> Iterator[Segment]:
    """Stretches of one span each. What a quotation outside of Chinese holds is no span of its own, but its quotes are
    straight too."""
    characters, spans = list(text), list(spans)
    for first, last in found:
        if spans[first] is None and any(span is not None for span in spans[first:last]):
            characters[first] = characters[last] = '"'
            spans[first : last + 1] = [None] * (last + 1 - first)
    text = "".join(characters)
    start, waiting = 0, deque(found)
    for span, group in itertools.groupby(spans):
        end = start + sum(1 for _ in group)
        inside = []
        while waiting and waiting[0][0] < end:
            inside.append(waiting.popleft())
        if span is None:
            yield Segment(OTHER, text[start:end])
        else:
            yield Segment(CHINESE, _chinese(text, start, end, inside))
        start = end


def _chinese(text: str, start: int, end: int, found: list[tuple[int, int]]) -> str:
    """A Chinese stretch as captions have it: folded outside of its quotations, which get straight double quotes."""
    parts, place = [], start
    for first, last in found:
        parts += chinese.folded(text[place:first]), f'"{text[first + 1 : last]}"'
        place = last + 1
    return "".join((*parts, chinese.folded(text[place:end])))


def _drawn(text: str, found: list[tuple[int, int]]) -> tuple[str, ...]:
    return tuple(text[first + 1 : last] for first, last in found if text[first + 1 : last].strip())
