"""A PNG encoder for one picture on many threads, without torch or ComfyUI.

It is filtered as a whole, then bands of rows are deflated side by side, each ending on a byte (Z_SYNC_FLUSH), so that
one after the other they are one zlib stream. Only deflating is spread over threads, and only after filtering: it is a
few long calls without the interpreter's lock, filtering many short ones that would wait for it.
"""

import math
import struct
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL.PngImagePlugin import PngInfo

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {3: 2, 4: 6}  # channels: RGB, RGBA
BAND_BYTES = 96 * 1024  # 32 rows of 1024 RGB pixels: fit a core's cache, and make work for 16 threads
WINDOW = 32 * 1024  # how far back a match of deflate can lie
MATCH_LEVEL = 4
SAMPLED = 8  # one row in as many decides how a band is deflated
GAIN = 0.97  # matches are looked for where they save 3 %, because they take twice the time or more
FLAT = 1 / 8  # or anything at all where runs leave less than that, because little is left to be deflated
ZLIB_HEADER = b"\x78\x01"
ADLER_BASE = 65521


class Band(NamedTuple):
    """Some rows: their IDAT chunk, and length and Adler-32 of what is deflated in it."""

    chunk: bytes
    length: int
    checksum: int


def filtered(pixels: np.ndarray) -> np.ndarray:
    """A picture, uint8 [height, width, 3 or 4], as PNG has it: uint8 [height, 1 + width * channels].

    Every row begins with the number of its filter: of the five, the one with the smallest sum of absolute differences.
    Raises ValueError for another shape or dtype.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in COLOUR_TYPES or not pixels.size:
        raise ValueError(f"expected uint8 [height, width, 3 or 4], got {pixels.dtype} {list(pixels.shape)}")
    height, width, channels = pixels.shape
    padded = np.zeros((height + 1, channels + width * channels), np.uint8)
    padded[1:, channels:] = pixels.reshape(height, width * channels)
    rows = np.empty((height, 1 + width * channels), np.uint8)
    step = max(1, BAND_BYTES // (width * channels))
    for start in range(0, height, step):
        _filter(padded[start : start + step + 1], channels, rows[start : start + step])
    return rows


def deflate(rows: np.ndarray, pool: Executor) -> list[Future[Band]]:
    """Starts to deflate filtered rows on the pool. They must stay unchanged until all bands are done."""
    height, length = rows.shape
    step = max(1, BAND_BYTES // length)
    return [pool.submit(_deflated, rows, start, min(start + step, height)) for start in range(0, height, step)]


def write(file: BinaryIO, shape: tuple[int, int, int], bands: Iterable[Future[Band]], text: Mapping[str, str]) -> None:
    """Writes a PNG as its bands get ready. shape: that of the pixels; text: keywords of 1 to 79 Latin-1 characters."""
    height, width, channels = shape
    file.write(SIGNATURE)
    file.write(_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, COLOUR_TYPES[channels], 0, 0, 0)))
    information = PngInfo()
    for keyword, value in text.items():
        information.add_text(keyword, value)
    for kind, data, *_ in information.chunks:
        file.write(_chunk(kind, data))
    file.write(_chunk(b"IDAT", ZLIB_HEADER))
    checksum = zlib.adler32(b"")
    for band in bands:
        chunk, length, following = band.result()
        file.write(chunk)
        checksum = _joined(checksum, following, length)
    file.write(_chunk(b"IDAT", struct.pack(">I", checksum)))
    file.write(_chunk(b"IEND", b""))


def _filter(padded: np.ndarray, channels: int, out: np.ndarray) -> None:
    """padded: rows with one above them and a pixel of zeros to their left."""
    here, left = padded[1:, channels:], padded[1:, :-channels]
    above, corner = padded[:-1, channels:], padded[:-1, :-channels]
    average = (left & above) + ((left ^ above) >> 1)
    differences = np.empty((5, *here.shape), np.uint8)
    differences[0] = here
    for number, prediction in enumerate((left, above, average, _paeth(left, above, corner)), start=1):
        np.subtract(here, prediction, out=differences[number])
    sums = np.abs(differences.view(np.int8)).view(np.uint8).sum(axis=2, dtype=np.uint32)
    out[:, 0] = chosen = sums.argmin(axis=0)
    out[:, 1:] = differences[chosen, np.arange(len(out))]


def _paeth(left: np.ndarray, above: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Of the three neighbours the nearest to left + above - corner; the first of equals. uint8 throughout.

    Left is |above - corner| away from it, above |left - corner|, and corner the difference of the two where it lies
    between left and above, else their sum, which is never the smallest. Masks take a seventh of np.where's time.
    """
    to_left, to_above = _distance(above, corner), _distance(left, corner)
    outside = _mask((above > corner) == (left > corner))
    to_corner = _distance(to_left, to_above) | outside
    nearest = corner ^ ((corner ^ above) & _mask(to_above <= to_corner))
    return nearest ^ ((nearest ^ left) & _mask(to_left <= np.minimum(to_above, to_corner)))


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.maximum(one, other) - np.minimum(one, other)


def _mask(condition: np.ndarray) -> np.ndarray:
    """255 where it holds, else 0."""
    return np.negative(condition.view(np.uint8))


def _deflated(rows: np.ndarray, start: int, stop: int) -> Band:
    band = rows[start:stop]
    if _matches_pay(band):
        before = rows.reshape(-1)[: start * rows.shape[1]][-WINDOW:]
        deflater = zlib.compressobj(MATCH_LEVEL, wbits=-zlib.MAX_WBITS, zdict=before)
    else:
        deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS, strategy=zlib.Z_RLE)
    end = zlib.Z_FINISH if stop == len(rows) else zlib.Z_SYNC_FLUSH
    return Band(_chunk(b"IDAT", deflater.compress(band) + deflater.flush(end)), band.size, zlib.adler32(band))


def _matches_pay(rows: np.ndarray) -> bool:
    """Whether looking for repetitions makes rows smaller than Huffman codes with runs, by some from their middle.

    It does in drawings and patterns. In photographs what repeats is noise: short matches that cost more than they save.
    """
    count = math.ceil(len(rows) / SAMPLED)
    sample = rows[(len(rows) - count) // 2 :][:count]
    matches = zlib.compressobj(MATCH_LEVEL, wbits=-zlib.MAX_WBITS)
    runs = zlib.compressobj(wbits=-zlib.MAX_WBITS, strategy=zlib.Z_RLE)
    with_matches, with_runs = (len(deflater.compress(sample) + deflater.flush()) for deflater in (matches, runs))
    return with_matches < (1 if with_runs < FLAT * sample.size else GAIN) * with_runs


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def _joined(checksum: int, following: int, length: int) -> int:
    """Adler-32 of two texts behind one another, from that of each and the length of the second.

    Its low half is 1 + the sum of the bytes, its high half the sum of all low halves on the way, both modulo 65521.
    """
    low = checksum % 2**16 + following % 2**16 - 1
    high = checksum // 2**16 + following // 2**16 + length * (checksum % 2**16 - 1)
    return high % ADLER_BASE * 2**16 + low % ADLER_BASE
