"""Pages shared by prompts that begin alike: never more than there are, none in use given up, none that is another's."""

import contextlib
import gc
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zimage_turbo.engine.pages import Pages

SIZE = 2
PROMPTS = st.lists(st.integers(0, 1), max_size=11)  # few tokens, so that many prompts begin alike


class Failed(Exception):
    pass


class Held:
    """An open lease and what its prompt would compute; pages of a memory hold the tokens up to their end."""

    def __init__(self, pages: Pages, memory: dict, ids: list[int]):
        self.manager, self.ids = pages.lease(ids), ids
        self.lease = self.manager.__enter__()
        for place, page in enumerate((*self.lease.known, *self.lease.own)):
            before = tuple(ids[: (place + 1) * SIZE])
            if place < len(self.lease.known):
                assert memory[page] == before  # what was written by another prompt, and not overwritten since
            else:
                memory[page] = before

    def close(self, fails: bool) -> None:
        if not fails:
            self.manager.__exit__(None, None, None)
            return
        with contextlib.suppress(Failed):
            self.manager.__exit__(Failed, Failed(), None)


def check(pages: Pages, count: int, open_leases: list[Held], memory: dict) -> None:
    known = [page for held in open_leases for page in held.lease.known]
    own = [page for held in open_leases for page in held.lease.own]
    everywhere = [*pages.free, *pages.recent, *own]
    assert sorted(everywhere) == list(range(count))  # each in one place
    assert set(known) <= set(pages.users) <= set(pages.recent)
    assert {key: page for page, key in pages.recent.items()} == pages.found
    order = list(pages.recent)
    for page, (before, tokens) in pages.recent.items():
        assert memory[page][-SIZE:] == tokens
        assert memory[page][:-SIZE] == (() if before is None else memory[before])
        assert before is None or order.index(before) > order.index(page)


@settings(max_examples=500)
@given(
    count=st.integers(0, 6),
    steps=st.lists(st.one_of(PROMPTS, st.tuples(st.integers(0, 3), st.booleans())), max_size=40),
)
def test_any_order_of_prompts(count, steps):
    """A step begins a prompt, or ends one of those that run: well or with an exception."""
    pages, memory, held = Pages(count, SIZE), {}, []
    for step in steps:
        if isinstance(step, list):
            held.append(Held(pages, memory, step))
        elif held:
            held.pop(step[0] % len(held)).close(step[1])
        check(pages, count, held, memory)
    for each in held:
        each.close(False)
    assert not pages.users and len(pages.free) + len(pages.found) == count


@given(count=st.integers(1, 6), prompts=st.lists(PROMPTS, max_size=30))
def test_least_recently_used_goes_first(count, prompts):
    """One prompt after another, against a plain list of prefixes, the least recently used first."""
    pages, used = Pages(count, SIZE), []
    for ids in prompts:
        whole = [tuple(ids[:end]) for end in range(SIZE, len(ids) + 1, SIZE)]
        known = next((place for place, prefix in enumerate(whole) if prefix not in used), len(whole))
        with pages.lease(ids) as lease:
            assert len(lease.known) == min(known, max(0, len(ids) - 1) // SIZE)
            assert known + len(lease.own) == min(len(whole), count)
        kept = whole[:count]
        used = ([prefix for prefix in used if prefix not in kept] + kept[::-1])[-count:]
        assert [prefix_of(pages, page) for page in pages.recent] == used


def prefix_of(pages: Pages, page: int | None) -> tuple[int, ...]:
    if page is None:
        return ()
    before, tokens = pages.recent[page]
    return prefix_of(pages, before) + tokens


def prompt(pages: Pages, ids) -> tuple[int, int]:
    """How many pages were known and how many were written."""
    with pages.lease(ids) as lease:
        return len(lease.known), len(lease.own)


def test_the_last_token_is_computed():
    pages = Pages(8, SIZE)
    assert prompt(pages, range(6)) == (0, 3)
    assert prompt(pages, range(6)) == (2, 0)
    assert prompt(pages, range(7)) == (3, 0)
    assert pages.counts == {"tokens": 19, "known": 10}


def test_the_same_tokens_elsewhere_are_others():
    pages = Pages(8, SIZE)
    prompt(pages, [1, 2, 3, 4])
    assert prompt(pages, [3, 4, 3, 4, 5]) == (0, 2)
    assert prompt(pages, [1, 2, 3, 4, 5]) == (2, 0)


def test_overlapping_prompts_of_the_same_tokens():
    """What both have computed is kept once."""
    pages = Pages(8, SIZE)
    with pages.lease([1, 2, 3, 4, 5]) as first:
        assert prompt(pages, [1, 2, 3, 4, 6, 7]) == (0, 3)
    assert not first.known and len(first.own) == 2
    assert len(pages.found) == 3 and len(pages.free) == 5
    assert prompt(pages, [1, 2, 3, 4, 6, 7, 8]) == (3, 0)


def test_a_page_in_use_is_not_given_up():
    pages = Pages(2, SIZE)
    prompt(pages, [1, 1, 2, 2])
    with pages.lease([1, 1, 2, 2, 3]) as lease:
        assert len(lease.known) == 2 and prompt(pages, range(10, 20)) == (0, 0)
    assert prompt(pages, [1, 1, 2, 2, 3]) == (2, 0)
    assert prompt(pages, range(10, 20)) == (0, 2) and pages.counts["evicted"] == 2
    assert prompt(pages, [1, 1, 2, 2, 3]) == (0, 2)


def test_a_prompt_that_failed_leaves_nothing():
    pages = Pages(4, SIZE)
    with pytest.raises(Failed), pages.lease([1, 2, 3]):
        raise Failed
    assert not pages.found and len(pages.free) == 4 and prompt(pages, [1, 2, 3]) == (0, 1)


def test_a_style_stays_while_tails_come_and_go():
    """Its pages are used with each prompt, so the tails of others go first."""
    pages, style = Pages(8, SIZE), list(range(8))
    prompt(pages, [*style, 0])
    for tail in range(100):
        assert prompt(pages, [*style, *[100 + tail] * 5])[0] == 4
    assert pages.counts["evicted"] > 100


def test_nothing_grows_over_10_000_prompts():
    pages = Pages(64, SIZE)

    def run(first: int, prompts: int) -> None:
        for number in range(first, first + prompts):
            prompt(pages, [*range(number % 7, 20), *[number] * (number % 9)])

    run(0, 1_000)
    gc.collect()
    tracemalloc.start()
    objects, before = len(gc.get_objects()), tracemalloc.get_traced_memory()[0]
    run(1_000, 10_000)
    gc.collect()
    growth = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert len(gc.get_objects()) - objects < 100
    assert growth < 50_000  # of 64 pages' keys that are allocated anew; a leaked key a prompt would be 2 MB
    assert len(pages.free) + len(pages.found) == 64 and not pages.users
