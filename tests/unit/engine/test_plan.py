"""How images are spread over ranks."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zimage_turbo.engine import plan
from zimage_turbo.engine.plan import AUTO, IMAGES, SEQUENCE

FOUR = ((0, 1, 2, 3),)
MEASURED = {1: 0.46, 2: 0.27, 4: 0.16}


def test_one_image_is_split_where_that_was_measured_to_pay():
    chosen = plan.choose(1, FOUR, AUTO, MEASURED)
    assert chosen.groups == ((0, 1, 2, 3),) and chosen.images == ((0,),)
    assert "4 ranks" in chosen.reason and "160 ms for a step of all" in chosen.reason


def test_one_image_stays_whole_where_a_split_does_not_pay():
    chosen = plan.choose(1, FOUR, AUTO, {1: 0.12, 2: 0.13, 4: 0.14})
    assert chosen.groups == ((0,),) and "no split" in chosen.reason


def test_two_images_on_four_ranks_take_two_each():
    assert plan.choose(2, FOUR, AUTO, MEASURED).groups == ((0, 1), (2, 3))


def test_many_images_stay_whole():
    chosen = plan.choose(16, FOUR, AUTO, MEASURED)
    assert chosen.groups == ((0,), (1,), (2,), (3,)) and [len(share) for share in chosen.images] == [4] * 4


def test_five_images_on_four_ranks_are_split_if_that_is_faster_than_a_second_round():
    """Whole: two rounds of 0.46 s; on pairs: three of 0.27; on all: five of 0.16."""
    assert len(plan.choose(5, FOUR, AUTO, MEASURED).groups[0]) == 4


def test_without_measurements_images_stay_whole():
    chosen = plan.choose(1, FOUR)
    assert chosen.groups == ((0,),) and "not been measured" in chosen.reason


def test_a_split_never_leaves_an_island():
    assert plan.choose(1, ((0, 1), (2, 3)), SEQUENCE).groups == ((0, 1),)
    assert plan.choose(1, ((0, 1), (2, 3)), AUTO, MEASURED).groups == ((0, 1),)


def test_ranks_that_a_split_leaves_over_are_used_for_whole_images():
    assert plan.choose(3, ((0, 1), (2,)), IMAGES).groups == ((0,), (1,), (2,))


def test_wrong_split():
    with pytest.raises(ValueError, match=r"split is 'rows'; choose one of auto, images, sequence\."):
        plan.choose(1, FOUR, "rows")


@pytest.mark.parametrize(("images", "islands"), [(0, FOUR), (1, ())])
def test_nothing_to_spread(images, islands):
    with pytest.raises(ValueError, match="at least one of each"):
        plan.choose(images, islands)


ISLANDS = st.lists(st.integers(1, 8), min_size=1, max_size=4).map(
    lambda sizes: tuple(tuple(range(sum(sizes[:at]), sum(sizes[: at + 1]))) for at in range(len(sizes)))
)
TIMES = st.dictionaries(st.integers(1, 8), st.floats(0.01, 10), max_size=8)


@given(st.integers(1, 200), ISLANDS, st.sampled_from(plan.SPLITS), TIMES)
def test_every_image_is_drawn_once_by_ranks_of_one_island(images, islands, split, seconds):
    chosen = plan.choose(images, islands, split, seconds)
    assert [number for share in chosen.images for number in share] == list(range(images))
    ranks = [rank for group in chosen.groups for rank in group]
    assert len(ranks) == len(set(ranks)) and len(chosen.groups) == len(chosen.images)
    assert all(any(set(group) <= set(island) for island in islands) for group in chosen.groups)
    counts = [len(share) for share in chosen.images]
    assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)


@given(st.integers(1, 64), ISLANDS, TIMES.filter(lambda times: 1 in times))
def test_no_measured_size_would_be_faster(images, islands, seconds):
    chosen = plan.choose(images, islands, AUTO, seconds)

    def time(size):
        return math.ceil(images / len(plan.groups_of(islands, size))) * seconds[size]

    largest = max(map(len, islands))
    assert time(len(chosen.groups[0])) == min(time(size) for size in seconds if size <= largest)
