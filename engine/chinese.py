"""Chinese as it is typed, brought to how captions write it: one form a character, Chinese punctuation, straight quotes.

Outside of quotes text is folded: NFKC, but only where the same character is meant. Full-width letters and digits, wide
spaces, CJK compatibility and vertical forms, and radicals that stand for their characters are folded; superscripts,
circled numbers, ligatures, fractions and unit signs say something of their own and stay. Punctuation between Chinese
characters becomes full-width, as it is printed. Nothing between quotes is touched: it is to be drawn.
"""

import re
import unicodedata

FULL_WIDTH = str.maketrans(",!?:;()", "，！？：；（）")
_FOLDED = (
    *((first, first) for first in (0xA0, 0x202F, 0x205F, 0x3000)),  # spaces
    (0x2000, 0x200A),
    (0x2E80, 0x2FD5),  # radicals
    (0xF900, 0xFAFF),  # compatibility ideographs
    (0x2F800, 0x2FA1F),
    (0xFE10, 0xFE18),  # vertical and small punctuation
    (0xFE35, 0xFE44),
    (0xFE47, 0xFE48),
    (0xFE50, 0xFE6B),
    (0xFF01, 0xFF5D),  # full-width letters, digits and signs; ～ (U+FF5E) is punctuation of its own
    (0xFF61, 0xFF64),  # half-width 。「」、
    (0xFFE0, 0xFFE1),
    (0xFFE5, 0xFFE6),
)


def _folds() -> dict[int, str]:
    folded = {
        code: unicodedata.normalize("NFKC", chr(code)) for span in _FOLDED for code in range(span[0], span[1] + 1)
    }
    return {code: form.translate(FULL_WIDTH) for code, form in folded.items()}


FOLDS = _folds()
IDEOGRAPHS = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
_BETWEEN = re.compile(rf"(?:(?<=[{IDEOGRAPHS}])|^) *([,!?:;.]) *(?=[{IDEOGRAPHS}]|$)")  # ^ and $: a quotation
_GAP = re.compile(rf"(?<=[{IDEOGRAPHS}]) +(?=[{IDEOGRAPHS}])")
_SPACE = re.compile(rf"(?<! ) +(?=[{IDEOGRAPHS}])")
_PUNCTUATION = FULL_WIDTH | str.maketrans(".", "。")


def folded(text: str) -> str:
    """Chinese outside of quotes as captions write it, with no space before a Chinese character."""
    text = _BETWEEN.sub(lambda match: match[1].translate(_PUNCTUATION), text.translate(FOLDS))
    return _SPACE.sub("", _GAP.sub("，", text))


def variants(characters: str) -> str:
    """These characters and all that fold to one of them, for a character class of a regular expression."""
    return re.escape(characters + "".join(chr(code) for code, form in FOLDS.items() if form in characters))


def is_ideograph(character: str) -> bool:
    return bool(re.match(f"[{IDEOGRAPHS}]", character))
