"""Where a prompt quotes text that is to be drawn: pairs of quotation marks, found in one pass."""

import re
from collections.abc import Sequence

# 《…》 is a title: on a cover, a poster or a plaque it is what is to be read. ︽, ﹁ and ﹃ are vertical forms, ｢ a
# half-width one.
PAIRS = {
    "“": "”", "「": "」", "『": "』", "《": "》", "‘": "’", "〝": "〞", "﹁": "﹂", "﹃": "﹄", "︽": "︾", "｢": "｣",
}  # fmt: skip
STRAIGHT = "\"＂'"
OUTSIDE = '“"'  # what opens a quotation outside of Chinese
_CLOSING = {closing: opening for opening, closing in PAIRS.items()}
_APOSTROPHES = "'’"  # between letters
_OTHERS = "".join({*PAIRS, *_CLOSING, *STRAIGHT} - {*_APOSTROPHES})
_MARKS = re.compile(rf"(?<![A-Za-z])[{_APOSTROPHES}]|[{_APOSTROPHES}](?![A-Za-z])|[{_OTHERS}]")


def quotations(text: str, spans: Sequence[int | None]) -> tuple[list[tuple[int, int]], list[int]]:
    """Places (opening mark, closing mark) of the outermost quotations, in order; and opening marks in Chinese that
    nothing closes.

    spans: for every place the number of the Chinese span that it lies in, None outside. Marks pair within one span, or
    outside of all of them, where a quotation may hold whole spans.
    """
    partners: dict[int, int] = {}
    waiting: dict[tuple[str, int | None], list[int]] = {}
    for match in _MARKS.finditer(text):
        place, mark = match.start(), match[0]
        span = spans[place]
        opened = waiting.setdefault((_CLOSING.get(mark, mark), span), [])
        if opened and mark not in PAIRS:
            partners[opened.pop()] = place
        elif (mark in PAIRS or mark in STRAIGHT) and (span is not None or _quotes_outside(text, place)):
            opened.append(place)
    found, unpaired, end = [], [], -1
    alone = {place for (_, span), places in waiting.items() if span is not None for place in places}
    for place in sorted(alone | partners.keys()):
        if place > end and place in alone:
            unpaired.append(place)
        elif place > end:
            end = partners[place]
            found.append((place, end))
    return found, unpaired


def _quotes_outside(text: str, place: int) -> bool:
    """Whether a mark outside of Chinese opens a quotation: 5" is a measure."""
    return text[place] in OUTSIDE and not text[max(place - 1, 0) : place].isdigit()
