"""How long the group of a process lives: as long as somebody needs it, and a grace."""

import contextlib
import time
from dataclasses import dataclass
from types import SimpleNamespace

import psutil
import pytest

from zimage_turbo.engine.group import coordinator
from zimage_turbo.engine.group import current as module
from zimage_turbo.engine.group.current import GRACE_SECONDS, Current
from zimage_turbo.engine.group.launch import Setup
from zimage_turbo.engine.group.team import Limits

SETUP = Setup(("cpu",), operations=("tests.unit.engine.group.faulty",))
LOOK, AMPLE = 0.01, 120.0
NEARLY, MORE = 0.8 * GRACE_SECONDS, 1.2 * GRACE_SECONDS


@dataclass(frozen=True)
class Owner:
    """Two of them are equal, as what two MODELs with the same settings are computed by."""

    name: str = "same"


def ended(current, seconds=10.0):
    deadline = time.monotonic() + seconds
    while current.document() is not None and time.monotonic() < deadline:
        time.sleep(LOOK)
    return current.document() is None


def lasts(current):
    return not ended(current, 10 * LOOK)


def test_ranks_end_after_their_last_owner():
    """Not while they work, not while another owner lives; those who ask later have new ones."""
    with contextlib.closing(Current(grace=0.5, look=LOOK)) as current:
        one, others = Owner(), [Owner()]
        group = current.group(SETUP, Limits(start=AMPLE), one)
        assert current.group(SETUP, owner=others[0]) is group
        del one
        request = {"steps": 4, "seconds": 0.3}
        answer = group.call("steps", lambda size: {0: request}, AMPLE, lambda *told: others.clear())
        assert answer == {0: {"rank": 0}}, "work is not cut short"
        worked, (rank,) = time.monotonic(), group.document()["ranks"]
        process = psutil.Process(rank["pid"])
        agent = process.parent()
        assert ended(current) and time.monotonic() - worked >= 0.5
        assert not process.is_running() and not agent.is_running()
        assert group.document()["state"] == coordinator.CLOSED
        assert current.group(SETUP) is not group


def test_a_start_ahead_is_not_waited_for():
    owner = Owner()
    with contextlib.closing(Current(look=LOOK)) as current:
        began = time.monotonic()
        current.begin(SETUP, owner)
        assert time.monotonic() - began < 1.0 and current.document()["ranks"] == []
        deadline = began + AMPLE
        while current.document()["state"] == coordinator.STARTING and time.monotonic() < deadline:
            time.sleep(LOOK)
        assert [rank["ready"] for rank in current.document()["ranks"]] == [True], "nobody has asked for anything"
        group = current.group(SETUP, owner=owner)
        assert group.call("echo", lambda size: {0: "there?"}, AMPLE) and group.document()["starts"] == 1


def test_a_start_ahead_takes_nothing_from_others(current, monkeypatch):
    begun = []
    monkeypatch.setattr(coordinator.Group, "begin", begun.append)
    group = current.group(SETUP, owner=(first := Owner()))
    current.begin(Setup(("cpu", "cpu")), Owner())
    assert current.group(SETUP, owner=first) is group and not begun, "the one that is there may be needed"


def test_who_starts_ahead_owns_it(current, pass_by, monkeypatch):
    """A loader that runs anew, whose MODEL takes another's place."""
    monkeypatch.setattr(coordinator.Group, "begin", lambda self: None)
    current.group(SETUP, owner=(before := Owner()))
    current.begin(SETUP, after := Owner())
    del before
    pass_by(MORE)
    assert lasts(current)
    del after
    pass_by(MORE)
    assert ended(current)


@pytest.fixture
def pass_by(monkeypatch):
    """Lets so many seconds pass, as far as `Current` sees. No group of these tests has processes."""
    passed = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + passed[0]))

    def pass_by(seconds):
        passed[0] += seconds

    return pass_by


@pytest.fixture
def current(pass_by):
    with contextlib.closing(Current(look=LOOK)) as made:
        yield made


def test_an_owner_keeps_it_and_then_the_grace(current, pass_by):
    owner, equal = Owner(), Owner()
    current.group(SETUP, owner=owner)
    current.group(SETUP, owner=equal)
    del owner
    pass_by(MORE)
    assert lasts(current)
    del equal
    pass_by(NEARLY)
    assert lasts(current)
    pass_by(MORE)
    assert ended(current)


def test_without_an_owner_it_stays(current, pass_by):
    current.group(SETUP)
    pass_by(MORE)
    assert lasts(current)


def test_what_was_left_by_all_ends_though_an_owner_lives(current, pass_by):
    """As in the host's cache, which keeps what no prompt uses. What was taken back holds no longer."""
    owner = Owner()
    current.group(SETUP, owner=owner)
    current.leave()
    pass_by(NEARLY)
    current.stay()
    pass_by(MORE)
    assert lasts(current)
    current.leave()
    assert lasts(current), "the grace begins now"
    pass_by(MORE)
    assert ended(current)


@pytest.mark.parametrize("waiting", [True, False])
def test_prompts_that_want_it_keep_it(current, pass_by, waiting):
    """After a request for memory only those that run; and beyond the last owner, which the host may drop before."""
    prompts = {"running", "waiting"}
    current.wanted = lambda waiting: "running" in prompts or (waiting and "waiting" in prompts)
    current.group(SETUP, owner=(owner := Owner()))
    current.leave(1.0, waiting)
    del owner
    pass_by(MORE)
    assert lasts(current)
    prompts.discard("running")
    assert lasts(current) if waiting else ended(current)
    prompts.discard("waiting")
    assert ended(current)


def test_a_sooner_end_stands(current, pass_by):
    """Whoever asked for memory gets it, though prompts without several GPUs follow."""
    current.group(SETUP, owner=(owner := Owner()))
    current.leave(1.0)
    current.leave()
    pass_by(1.0)
    assert ended(current) and owner


def test_each_request_puts_the_end_off(current, pass_by):
    owner = Owner()
    group = current.group(SETUP, owner=owner)
    current.leave()
    for _ in range(3):
        pass_by(NEARLY)
        assert current.group(SETUP, owner=owner) is group and lasts(current)
    current.leave(1.0)
    pass_by(1.0)
    assert ended(current)


def test_another_groups_owner_does_not_end_this_one(current, pass_by):
    owner, other = Owner(), Owner()
    current.group(SETUP, owner=owner)
    current.group(Setup(("cpu", "cpu")), owner=other)
    del owner
    pass_by(MORE)
    assert lasts(current)
