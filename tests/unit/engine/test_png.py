"""The PNG encoder against two decoders, the format's own checks, and Pillow's encoder."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from zimage_turbo.engine import png

# Height, width; a row of the last is more than a band.
SIZES = [(1, 1), (1, 3), (2, 1), (5, 7), (31, 257), (257, 333), (1024, 64), (3, 40_001)]
PILLOW_LEVEL = 4  # the host's


def encoded(pixels: np.ndarray, text: dict[str, str] | None = None, threads: int = 2) -> bytes:
    file = io.BytesIO()
    with ThreadPoolExecutor(threads) as pool:
        png.write(file, pixels.shape, png.deflate(png.filtered(pixels), pool), text or {})
    return file.getvalue()


def by_pillow(pixels: np.ndarray, text: dict[str, str] | None = None) -> bytes:
    information = PngInfo()
    for keyword, value in (text or {}).items():
        information.add_text(keyword, value)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", pnginfo=information, compress_level=PILLOW_LEVEL)
    return file.getvalue()


def chunks(file: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and data of each chunk; every checksum is right and nothing stands between or behind them."""
    assert file.startswith(png.SIGNATURE)
    place, found = len(png.SIGNATURE), []
    while place < len(file):
        length, kind = struct.unpack_from(">I4s", file, place)
        data = file[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", file, place + 8 + length) == (zlib.crc32(kind + data),)
        found.append((kind, data))
        place += 12 + length
    assert place == len(file)
    return found


def filtered_rows(file: bytes) -> bytes:
    """What is deflated in the IDAT chunks; zlib checks header, checksum and end."""
    inflater = zlib.decompressobj()
    rows = inflater.decompress(b"".join(data for kind, data in chunks(file) if kind == b"IDAT"))
    assert inflater.eof and not inflater.unused_data
    return rows


def decoded(file: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(file)) as picture:
        return np.asarray(picture)


def noise(height: int, width: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def natural(side: int, grain: float, seed: int = 0) -> np.ndarray:
    """Smooth waves of colour under noise of as many grey levels."""
    draw = np.random.default_rng(seed)
    down, across = np.mgrid[0:side, 0:side] / side
    waves = sum(
        np.sin(2 * np.pi * (down[..., None] * draw.uniform(0.5, 6, 3) + across[..., None] * draw.uniform(0.5, 6, 3)))
        for _ in range(6)
    )
    return np.clip(128 + 25 * waves + draw.normal(0, grain, waves.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_pixels_come_back(height, width, channels):
    pixels = noise(height, width, channels)
    file = encoded(pixels)
    assert np.array_equal(decoded(file), pixels)
    assert len(filtered_rows(file)) == height * (1 + width * channels)


@settings(max_examples=60, deadline=None)
@given(
    some.integers(1, 90), some.integers(1, 90), some.sampled_from([3, 4]), some.integers(1, 255), some.integers(0, 99)
)
def test_pixels_of_any_size_and_contrast_come_back(height, width, channels, values, seed):
    pixels = noise(height, width, channels, seed) % np.uint8(values)
    assert np.array_equal(decoded(encoded(pixels)), pixels)


@pytest.mark.parametrize("channels", [3, 4])
def test_another_decoder_gives_the_same_pixels(channels):
    pixels = np.concatenate((natural(256, 2.0), natural(256, 0.0)[..., :1]), axis=2)[..., :channels].copy()
    with av.open(io.BytesIO(encoded(pixels)), format="png_pipe") as container:
        (frame,) = container.decode(video=0)
    assert np.array_equal(frame.to_ndarray(format={3: "rgb24", 4: "rgba"}[channels]), pixels)


def test_all_filters_are_used_and_undone():
    height, width = 40, 600
    draw = np.random.default_rng(3)
    line, grain = draw.integers(0, 256, (width, 3)), draw.integers(0, 3, (height, width, 3))
    slopes = np.cumsum(draw.integers(-9, 10, (height, width, 3)), axis=1)
    parts = [
        np.where(draw.random((height, width, 3)) < 0.1, 255, 0),  # nothing to predict
        slopes,  # like their left neighbours
        np.broadcast_to(line, (height, width, 3)) + grain,  # like those above
        natural(width, 6.0)[:height],  # like the mean of both
        np.broadcast_to(line, (height, width, 3)) + 40 * np.arange(height)[:, None, None],  # like left + above - corner
    ]
    pixels = np.concatenate(parts).astype(np.uint8)
    file = encoded(pixels)
    assert set(filtered_rows(file)[:: 1 + width * 3]) == set(range(5))
    assert np.array_equal(decoded(file), pixels)


def test_every_thread_count_gives_the_same_file():
    pixels = natural(400, 1.0)
    assert encoded(pixels, threads=1) == encoded(pixels, threads=5)


def test_a_strided_picture_is_read_in_its_order():
    planes = noise(3, 50, 70)[..., :60]
    pixels = planes.transpose(1, 2, 0)
    assert np.array_equal(decoded(encoded(pixels)), pixels)


@pytest.mark.parametrize("grain", [0.0, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_natural_picture_takes_no_more_room_than_by_pillow(grain, seed):
    pixels = natural(512, grain, seed)
    assert len(encoded(pixels)) <= 1.03 * len(by_pillow(pixels))


def test_noise_takes_no_more_room_than_by_pillow():
    pixels = noise(512, 512, 3)
    assert len(encoded(pixels)) <= 1.001 * len(by_pillow(pixels))


def test_a_drawing_takes_no_more_room_than_by_pillow(pack):
    with Image.open(pack / "demo" / "grid.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    file = encoded(pixels)
    assert len(file) <= 1.03 * len(by_pillow(pixels))
    assert np.array_equal(decoded(file), pixels)  # matches reach into the band before


def test_a_repeated_texture_is_deflated_as_such():
    pixels = np.tile(natural(64, 8.0), (8, 8, 1))
    file = encoded(pixels)
    assert len(file) < len(encoded(natural(512, 8.0))) / 4  # every row repeats eight times
    assert np.array_equal(decoded(file), pixels)


@pytest.mark.parametrize(
    "text",
    [{"prompt": '{"a": 1}', "workflow": "é" * 70_000}, {"parameters": "红色的圆\nsecond line"}, {"empty": ""}, {}],
    ids=["latin", "chinese", "empty", "none"],
)
def test_text_is_stored_as_pillow_stores_it(text):
    pixels = noise(4, 4, 3)
    ours, theirs = (
        [chunk for chunk in chunks(file) if chunk[0] in (b"tEXt", b"iTXt", b"zTXt")]
        for file in (encoded(pixels, text), by_pillow(pixels, text))
    )
    assert ours == theirs
    with Image.open(io.BytesIO(encoded(pixels, text))) as picture:
        assert picture.info == text


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4, 3)), *(np.zeros(shape, np.uint8) for shape in ((4, 4, 2), (4, 4), (0, 4, 3), (1, 4, 4, 3)))],
    ids=lambda pixels: f"{pixels.dtype} {pixels.shape}",
)
def test_other_shapes_and_types_are_refused(pixels):
    with pytest.raises(ValueError, match=r"expected uint8 \[height, .* got .*4"):
        png.filtered(pixels)
