"""What a byte-level tokenizer made of a text: which characters it split, and which tokens a piece of the text became.

Tokens are given as the vocabulary writes them: one printable character a byte.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # bytes that are written as themselves


@functools.cache
def _bytes_of() -> dict[str, int]:
    """The byte that each character of a vocabulary stands for: others than printable ones count on from U+0100."""
    others = (byte for byte in range(256) if byte not in _PRINTABLE)
    return {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


@dataclass(frozen=True)
class Tokenised:
    """The bytes of a text, and where each token begins in them (one more entry: where the last one ends)."""

    data: bytes
    edges: tuple[int, ...]

    @classmethod
    def of(cls, tokens: Sequence[str | None]) -> "Tokenised":
        """tokens: as in the vocabulary; None for what is no text, such as an embedding."""
        table, data, edges = _bytes_of(), bytearray(), [0]
        for token in tokens:
            known = token is not None and all(character in table for character in token)
            data += bytes(table[character] for character in token) if known else (token or "").encode()
            edges.append(len(data))
        return cls(bytes(data), tuple(edges))

    def split_characters(self) -> tuple[str, ...]:
        """Characters that more than one token makes up, each once, in order: their parts mean little to the model."""
        edges, found, place = set(self.edges), {}, 0
        for character in self.data.decode(errors="replace"):
            size = len(character.encode())
            if any(place + inner in edges for inner in range(1, size)):
                found[character] = None
            place += size
        return tuple(found)

    def tokens_of(self, text: str, start: int = 0) -> tuple[range, int] | None:
        """The numbers of the tokens that hold `text`, sought from byte `start` on, and the byte behind it; None if it
        does not stand there."""
        first = self.data.find(text.encode(), start)
        if first < 0:
            return None
        last = first + len(text.encode())
        number = [n for n in range(len(self.edges) - 1) if self.edges[n] < last and self.edges[n + 1] > first]
        return range(number[0], number[-1] + 1), last
