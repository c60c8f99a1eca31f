"""A processor does not run far ahead of its GPU, and says so when that stands still."""

import datetime

import pytest
import torch

from zimage_turbo.engine import pace


class Steps:
    """Of a GPU, each done after so many looks at it; `most`: how many were ever asked for and not done."""

    def __init__(self, looks):
        self.looks, self.asked, self.done, self.most = looks, 0, 0, 0

    def record_event(self):
        self.asked += 1
        self.most = max(self.most, self.asked - self.done)
        return Event(self, self.looks)


class Event:
    def __init__(self, steps, looks):
        self.steps, self.looks = steps, looks

    def query(self):
        self.looks -= 1
        self.steps.done += self.looks == 0
        return self.looks <= 0


def paced(monkeypatch, looks, seconds):
    steps = Steps(looks)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: steps)
    return steps, pace.Pace(torch.device("cuda"), datetime.timedelta(seconds=seconds))


def test_no_more_steps_are_asked_for_than_it_may_be_ahead(monkeypatch):
    steps, own = paced(monkeypatch, looks=3, seconds=60)
    for _ in range(8):
        own.step()
    assert steps.most == pace.AHEAD + 1 and steps.done == 8 - pace.AHEAD
    own.wait()
    assert steps.done == 8


def test_a_gpu_that_stands_still_is_told_of(monkeypatch):
    _, own = paced(monkeypatch, looks=1 << 30, seconds=0.05)
    own.step()
    own.step()
    with pytest.raises(torch.distributed.DistError, match=r"a step is not done after 0\.05 s"):
        own.step()
    with pytest.raises(torch.distributed.DistError):
        own.wait()


def test_one_that_waits_for_nobody_has_no_limit(monkeypatch):
    steps, own = paced(monkeypatch, looks=300, seconds=0)
    own.limit = None
    own.step()
    own.wait()
    assert steps.done == 1


def test_a_processor_is_never_ahead():
    own = pace.Pace(torch.device("cpu"), datetime.timedelta(seconds=0))
    for _ in range(8):
        own.step()
    own.wait()
