"""Scenes and captions: repeatable, honest about what is held out, and drawable in the size that was asked for."""

import random

import pytest

from zimage_turbo.demo import world
from zimage_turbo.demo.captions import caption
from zimage_turbo.demo.checkpoint import load_tokenizer
from zimage_turbo.demo.dataset import OTHER_SIZES, Job, make_rows
from zimage_turbo.demo.defaults import settle
from zimage_turbo.demo.prompts import SETS
from zimage_turbo.demo.tokenization import encode


@pytest.fixture(scope="module")
def tokenizer(pack):
    return load_tokenizer(pack / "demo")


def captions(seed: int, count: int, drop: float | None = None):
    rng = random.Random(seed)
    return [caption(rng, world.sample_scene(rng), drop) for _ in range(count)]


def test_the_same_seed_gives_the_same_captions():
    assert captions(3, 50) == captions(3, 50)
    assert captions(3, 50) != captions(4, 50)


def test_everything_is_said_when_nothing_is_dropped():
    for text, said in captions(5, 200, drop=0.0):
        assert said.ground is not None, text
        assert all(None not in (s.kind, s.colour, s.size) for s in said.shapes), text
        assert said.sign is None or None not in (said.sign.ink, said.sign.place), text


def test_short_captions_leave_things_open():
    said = [said for _, said in captions(6, 200, drop=0.9)]
    assert sum(s.ground is None for s in said) > 100


def test_training_shows_no_held_out_caption_or_sign(tokenizer):
    rows = make_rows(tokenizer, Job((256, 256), 300, seed=7))
    for ids, length in zip(rows["tokens"], rows["length"], strict=True):
        text = tokenizer.decode(ids[:length], skip_special_tokens=True)
        prompt = text.removeprefix("user\n").removesuffix("assistant\n").removesuffix("\n")
        assert not world.held_out(prompt), prompt


@pytest.mark.parametrize("name", list(SETS))
def test_prompts_are_held_out_and_repeatable(name):
    prompts = SETS[name](30)
    assert prompts == SETS[name](30)
    for prompt in prompts:
        assert world.held_out(prompt.text), prompt.text
        sign = prompt.said.sign
        assert sign is None or len(sign.text) == 1 or world.held_out(sign.text), sign.text


def test_training_signs_are_not_held_out():
    rng = random.Random(8)
    texts = [world.sample_text(rng, 256, 256, test=False) for _ in range(500)]
    assert not any(len(text) > 1 and world.held_out(text) for text in texts)


@pytest.mark.parametrize("size", [(192, 384), (384, 192), *OTHER_SIZES[:3]])
def test_shapes_and_signs_stay_inside_the_picture(size):
    rng = random.Random(9)
    for _ in range(100):
        scene = world.sample_scene(rng, *size)
        for shape in scene.shapes:
            assert shape.radius < shape.x < size[0] - shape.radius
            assert shape.radius < shape.y < size[1] - shape.radius
        if scene.sign:
            left, _, right, _ = world.sign_box(scene.sign, 0)
            assert left >= 0 and right <= size[0]


def test_what_was_said_is_what_is_drawn():
    rng = random.Random(10)
    for _ in range(300):
        scene = world.sample_scene(rng)
        text, said = caption(rng, scene)
        drawn = settle(scene, said)
        if drawn is None:
            continue
        assert said.ground in (None, drawn.ground), text
        for words, shape in zip(said.shapes, drawn.shapes, strict=True):
            for name in ("kind", "colour", "size"):
                assert getattr(words, name) in (None, getattr(shape, name)), text
        if said.sign:
            assert (said.sign.ink or drawn.sign.ink, said.sign.text) == (drawn.sign.ink, drawn.sign.text), text


def test_every_character_that_can_be_drawn_is_one_token(tokenizer):
    long = [glyph for glyph in world.GLYPHS if len(tokenizer.encode(glyph).ids) != 1]
    assert not long


def test_a_sign_text_is_read_character_by_character(tokenizer):
    framed = len(encode(tokenizer, 'the text "A"'))
    for text in ("OPEN", "新年快乐", "2026"):
        assert len(encode(tokenizer, f'the text "{text}"')) == framed + len(text) - 1
