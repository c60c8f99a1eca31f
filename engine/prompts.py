"""Prompts as the node takes them: read as bilingual, encoded in one context or in segments, and reported on.

A weight of the Chinese spans moves the states of the whole prompt on the line from those of the same prompt in which
the spans are blank (weight 0) to what they are (weight 1), and beyond. Scaling the states of a span, or of all, would
do nothing: the model's caption embedder begins with an RMS norm, which divides by their length.
"""

import itertools
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch

from . import bilingual, text
from .bilingual import CHINESE, Bilingual, Notice
from .tokens import Tokenised

ONE_CONTEXT, OWN_SEGMENTS = "one context", "own segments"
SPANS = (ONE_CONTEXT, OWN_SEGMENTS)
ENCODER = "qwen3_4b"
BLANK = " "
MOST_LISTED = 12  # of a kind, in a report
Texts = list[tuple[Hashable, dict]]  # as `text.encode_tokens` takes them


@dataclass(frozen=True)
class Report:
    """What became of a prompt. sent: the texts that were encoded, each in a chat turn of its own; tokens: of all of
    them, the turns' own included; split: characters that the tokenizer has no token for."""

    sent: tuple[str, ...]
    tokens: int
    drawn: tuple[str, ...]
    split: tuple[str, ...]
    notices: tuple[Notice, ...]

    def __str__(self) -> str:
        over = self.tokens - text.RECOMMENDED_TOKENS
        lines = [f"{self.tokens:,} tokens of {text.RECOMMENDED_TOKENS}"]
        if over > 0:
            lines[0] += f": the last {over:,} are beyond what the model was trained on; none is cut off"
        lines += [f"Sent: {sent}" for sent in self.sent]
        if self.drawn:
            lines.append("To be drawn: " + _listed([f'"{each}"' for each in self.drawn]))
        if self.split:
            lines.append("Split into bytes, likely drawn wrong: " + _listed([_named(each) for each in self.split]))
        lines += [f"Warning {notice}" for notice in self.notices[:MOST_LISTED]]
        if len(self.notices) > MOST_LISTED:
            lines.append(f"Warning: {len(self.notices) - MOST_LISTED:,} more of this kind")
        return "\n".join(lines)


def lines(prompts: str) -> list[str]:
    """One prompt a line; blank lines are none. Without any, the text itself."""
    return [line for line in prompts.split("\n") if line.strip()] or [prompts]


def encode(clip, prompt: str, spans: str = ONE_CONTEXT, zh_weight: float = 1.0) -> tuple[list, Report]:
    """Standard CONDITIONING without padding for one prompt, which may have [zh] tags; without any, that of
    `text.encode`.

    spans: ONE_CONTEXT: one chat turn for all; OWN_SEGMENTS: one for what is not Chinese and one for each span, their
    states [1, tokens, width] joined along the tokens. Raises ValueError for what cannot be encoded.
    """
    return encode_all(clip, [prompt], spans, zh_weight)[0]


def encode_all(
    clip, prompts: Sequence[str], spans: str = ONE_CONTEXT, zh_weight: float = 1.0
) -> list[tuple[list, Report]]:
    """What `encode` gives for each prompt; all are read before any is encoded, so that ranks can share them out."""
    read = []
    for number, prompt in enumerate(prompts, 1):
        try:
            read.append(_read(clip, prompt, spans, zh_weight))
        except ValueError as error:
            place = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
            raise ValueError(f"{place}{error}") from error
    wanted, reports = zip(*read, strict=True)
    texts = [each for parts in wanted for part in parts for each in part]
    encoded = iter(text.encode_tokens(clip, texts))
    joined = [
        _joined([_weighted(itertools.islice(encoded, len(part)), zh_weight) for part in parts]) for parts in wanted
    ]
    return list(zip(joined, reports, strict=True))


def _read(clip, prompt: str, spans: str, weight: float) -> tuple[list[Texts], Report]:
    """The texts to be encoded for each part of a prompt, and the report. Raises ValueError."""
    text.check_prompt(prompt)
    said = bilingual.read(prompt)
    text.check_prompt(said.prompt)
    parts = _parts(said, spans)
    tokens = [clip.tokenize(part) for part, _ in parts]
    count = sum(map(text.token_count, tokens))
    text.check_length(prompt, count)
    wanted = [_texts(clip, part, chinese, each, weight) for (part, chinese), each in zip(parts, tokens, strict=True)]
    return wanted, _report(clip, said, parts, tokens, count)


def _parts(said: Bilingual, spans: str) -> list[tuple[str, tuple[str, ...]]]:
    """The texts to be encoded, and what of each is Chinese."""
    apart = said.apart() if said.tagged and spans == OWN_SEGMENTS else ()
    if apart:
        return [(each.text, (each.text,) * (each.language == CHINESE)) for each in apart]
    return [(said.prompt, tuple(each.text for each in said.segments if each.language == CHINESE))]


def _texts(clip, part: str, chinese: Sequence[str], tokens: dict, weight: float) -> Texts:
    """The part as it is and, if its Chinese is weighed, with blanks in its place."""
    whole = (part, tokens)
    if weight == 1.0 or not chinese:
        return [whole]
    return [whole, ((part, chinese), _blanked(clip, tokens, chinese))]


def _weighted(encoded: Iterable[list], weight: float) -> list:
    """Of the conditionings of a part's `_texts`."""
    whole, *blank = encoded
    if not blank:
        return whole
    pairs = zip(whole, *blank, strict=True)
    return [[torch.lerp(without, states, weight), extra] for (states, extra), (without, _) in pairs]


def _blanked(clip, tokens: dict, chinese: Sequence[str]) -> dict:
    """The same tokens with blanks in the place of the Chinese ones. Raises ValueError."""
    if ENCODER not in tokens:
        raise ValueError(
            f"zh_weight needs the text encoder of Z-Image ({ENCODER}), but clip has {', '.join(tokens)}. "
            "Connect the loader's CLIP, or set zh_weight to 1."
        )
    (row,) = tokens[ENCODER]
    (((blank, _),),) = clip.tokenize(BLANK, llama_template="{}")[ENCODER]
    known, row, place = _tokenised(clip, row), list(row), 0
    for span in chinese:
        found = known.tokens_of(unicodedata.normalize("NFC", span), place)
        if found is None:
            raise ValueError(
                f"zh_weight cannot weigh {span[:20]!r}, which an embedding or an escaped bracket interrupts. "
                "Put it outside of the [zh] span, or set zh_weight to 1."
            )
        numbers, place = found
        for number in numbers:
            row[number] = (blank, *row[number][1:])
    return {ENCODER: [row]}


def _tokenised(clip, row: list) -> Tokenised:
    vocabulary = getattr(clip.tokenizer, ENCODER).inv_vocab
    return Tokenised.of([vocabulary.get(each[0]) if isinstance(each[0], int) else None for each in row])


def _joined(encoded: list[list]) -> list:
    """Conditionings of several texts as one: states and masks joined along the tokens."""
    if len(encoded) == 1:
        return encoded[0]
    joined = []
    for pairs in zip(*encoded, strict=True):
        extra = dict(pairs[0][1])
        if "attention_mask" in extra:
            extra["attention_mask"] = torch.cat([other["attention_mask"] for _, other in pairs], 1)
        joined.append([torch.cat([states for states, _ in pairs], 1), extra])
    return joined


def _report(clip, said: Bilingual, parts: list, tokens: list[dict], count: int) -> Report:
    rows = [row for each in tokens for row in each.get(ENCODER, ())]
    split = dict.fromkeys(character for row in rows for character in _tokenised(clip, row).split_characters())
    return Report(tuple(part for part, _ in parts), count, said.drawn, tuple(split), said.notices)


def _listed(items: Sequence[str]) -> str:
    more = len(items) - MOST_LISTED
    return ", ".join(items[:MOST_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def _named(character: str) -> str:
    """A character with its code, and the usual form of it if there is one."""
    usual = unicodedata.normalize("NFKC", character)
    return f"{character} (U+{ord(character):04X}" + (f", usually {usual})" if usual != character else ")")
