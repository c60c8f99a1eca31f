"""The judge accepts what was said and nothing else: it is tried on rendered pictures, right and wrong ones."""

import random
from dataclasses import replace

import pytest
import torch

from zimage_turbo.demo.captions import caption
from zimage_turbo.demo.defaults import settle
from zimage_turbo.demo.evaluate import lower_bound, summarise
from zimage_turbo.demo.judge import judge
from zimage_turbo.demo.picture import load_atlas, render, stack_scenes
from zimage_turbo.demo.world import Scene, Shape, Sign, sample_scene


def picture(scene: Scene) -> torch.Tensor:
    drawn = render(stack_scenes([scene]), scene.width, scene.height, load_atlas())[0]
    return (drawn.permute(1, 2, 0) + 1) / 2


@pytest.fixture
def scene() -> Scene:
    return Scene(
        256,
        256,
        ("pink", "pink"),
        [Shape("circle", "blue", "large", "bottom", 128, 194, 52, 0.0)],
        Sign("中OK", "red", "white", "top", 128, 66, 66),
    )


def test_right_pictures_are_right():
    rng = random.Random(1)
    for _ in range(15):
        size = rng.choice([(256, 256), (192, 320), (384, 240)])
        scene = sample_scene(rng, *size)
        text, said = caption(rng, scene)
        drawn = settle(scene, said)
        if drawn is not None:
            verdict = judge(picture(drawn), replace(said, width=size[0], height=size[1]))
            assert verdict.all_right, (text, verdict)


def test_a_swapped_colour_is_wrong(scene):
    shown = replace(scene, shapes=[replace(scene.shapes[0], colour="green")])
    assert judge(picture(shown), scene).shapes == [False]


def test_a_swapped_kind_is_wrong(scene):
    for kind in ("square", "triangle", "star", "ring", "heart", "diamond", "cross"):
        shown = replace(scene, shapes=[replace(scene.shapes[0], kind=kind)])
        assert judge(picture(shown), scene).shapes == [False], kind


def test_a_moved_shape_is_wrong(scene):
    shown = replace(scene, shapes=[replace(scene.shapes[0], x=62)])
    assert judge(picture(shown), scene).shapes == [False]


def test_a_shape_of_the_other_size_is_wrong(scene):
    shown = replace(scene, shapes=[replace(scene.shapes[0], radius=29)])
    assert judge(picture(shown), scene).shapes == [False]


def test_a_missing_second_shape_is_wrong(scene):
    said = replace(scene, shapes=[replace(scene.shapes[0], place=None)] * 2)
    assert sorted(judge(picture(scene), said).shapes) == [False, True]


def test_a_swapped_character_is_wrong(scene):
    shown = replace(scene, sign=replace(scene.sign, text="申OK".replace("申", "国")))
    assert judge(picture(shown), scene).characters == [False, True, True]


def test_another_ink_is_wrong(scene):
    shown = replace(scene, sign=replace(scene.sign, ink="green"))
    assert judge(picture(shown), scene).sign_colours == [False, True]


def test_another_background_is_wrong(scene):
    assert judge(picture(replace(scene, ground=("mint", "mint"))), scene).ground is False


def test_what_is_unsaid_is_free(scene):
    said = Scene(256, 256, None, [Shape("circle")], Sign("中OK"))
    assert judge(picture(scene), said).all_right


def test_an_empty_picture_shows_nothing(scene):
    verdict = judge(torch.full((256, 256, 3), 0.5), scene)
    assert not any([verdict.ground, *verdict.shapes, *verdict.characters])


def test_a_picture_of_another_size_is_refused(scene):
    with pytest.raises(ValueError, match="192x256"):
        judge(torch.zeros(256, 192, 3), scene)


def test_the_summary_counts_every_item(scene):
    summary = summarise([judge(picture(scene), scene)])
    assert summary["characters"]["total"] == 3 and summary["pictures"]["right"] == 1


def test_the_lower_bound_needs_evidence():
    assert lower_bound(3, 3) < lower_bound(300, 300) < 1
    assert lower_bound(50, 100) < 0.5
