"""Which shapes get a CUDA graph, and which graphs are given up; capture and replay themselves: tests/gpu."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from zimage_turbo.engine.graphs import CAPTURE, EAGER, MAX_SEEN, REPLAY, WARM_UP, Graphs


class Counted(Graphs):
    """Captures are counted, and replays are calls."""

    def __init__(self, limit: int, spares_one=lambda device: True):
        super().__init__(limit, spares_one)
        self.captures = []

    def capture(self, function, inputs):
        self.captures.append(len(inputs[0]))
        return Replayed(function)


class Replayed:
    def __init__(self, function):
        self.replay = lambda inputs: function(*inputs)


def run(graphs: Graphs, size: int, state: str = "as loaded") -> bool:
    """Whether a request of that size ran by a graph."""
    result = graphs.run(lambda x: x + 1, [torch.zeros(size)], state)
    assert result is None or torch.equal(result, torch.ones(size))
    return result is not None


def test_a_shape_is_captured_after_its_first_evaluations():
    graphs = Counted(4)
    assert [run(graphs, 3) for _ in range(WARM_UP + 2)] == [False] * WARM_UP + [True, True]
    assert graphs.captures == [3]


def test_the_graph_that_was_not_used_for_longest_is_given_up():
    graphs = Counted(2)
    for size in (1, 2, 1, 2, 1, 3, 3):
        run(graphs, size)
    assert graphs.captures == [1, 2, 3]
    assert run(graphs, 1) and graphs.captures == [1, 2, 3]
    assert run(graphs, 2) and graphs.captures == [1, 2, 3, 2]


def test_another_state_leaves_no_graph():
    graphs = Counted(2)
    states = ("as loaded", "as loaded", "with a LoRA", "with a LoRA", "as loaded", "as loaded")
    assert [run(graphs, 1, state) for state in states] == [False, True] * 3
    assert graphs.captures == [1, 1, 1]


def test_none_is_captured_while_memory_is_short():
    room = [False, False, True]
    graphs = Counted(2, lambda device: room.pop(0))
    assert [run(graphs, 1) for _ in range(WARM_UP + 4)] == [False] * WARM_UP + [False, False, True, True]
    assert not room


def test_given_up_means_none_any_more():
    graphs = Counted(2)
    run(graphs, 1), run(graphs, 1)
    graphs.give_up()
    assert not any(run(graphs, 1) for _ in range(3)) and graphs.captures == [1]


def test_what_cannot_be_captured_is_not_tried_again(caplog, monkeypatch):
    graphs = Counted(2)
    monkeypatch.setattr(graphs, "capture", lambda *_: pytest.fail("again") if caplog.text else impossible())
    assert not any(run(graphs, 1) for _ in range(WARM_UP + 3))
    assert "operation not permitted" in caplog.text


def test_ranks_capture_all_or_none(caplog, monkeypatch):
    """What another rank could do is asked for at each request, and again after a capture."""
    steps = [EAGER] * WARM_UP + [EAGER, CAPTURE, True, REPLAY, EAGER, REPLAY] + [EAGER] * WARM_UP + [CAPTURE, False]
    graphs = Counted(2)
    monkeypatch.setattr(graphs, "least", lambda own: min(own, steps.pop(0)))
    ran = [run(graphs, 1) for _ in range(WARM_UP + 5)]
    assert ran == [False] * WARM_UP + [False, True, True, False, True]
    assert [run(graphs, 2) for _ in range(WARM_UP + 1)] == [False] * (WARM_UP + 1)
    assert "another rank could not capture" in caplog.text and not steps
    steps.append(REPLAY)
    assert not run(graphs, 2) and graphs.captures == [1, 2]


def test_a_rank_that_lost_its_graphs_has_all_capture_again():
    """Two ranks, of which one's weights move on the way, and lie still nowhere for a while."""
    meeting, said = threading.Barrier(2), [0, 0]

    def rank(number, states):
        def least(own):
            said[number] = own
            meeting.wait(10)
            found = min(said)
            meeting.wait(10)
            return found

        graphs = Counted(2)
        graphs.least = least
        return [run(graphs, 1, state) for state in states], graphs.captures

    moved = [*["here"] * 3, *["there"] * 3, None, None, *["there"] * 3]
    with ThreadPoolExecutor(2) as threads:
        still, other = threads.map(rank, range(2), (["here"] * len(moved), moved))
    assert still == other == ([*[False, True, True] * 2, False, False, False, True, True], [1, 1, 1])


def test_a_rank_that_cannot_capture_tells_the_others(monkeypatch):
    told, graphs = [], Counted(2)
    monkeypatch.setattr(graphs, "least", lambda step: told.append(step) or step)
    monkeypatch.setattr(graphs, "capture", lambda *_: impossible())
    assert not any(run(graphs, 1) for _ in range(WARM_UP + 3))
    assert told == [EAGER] * WARM_UP + [CAPTURE, False, EAGER, EAGER]


def impossible():
    raise RuntimeError("operation not permitted when stream is capturing")


def test_ever_new_shapes_take_no_memory():
    graphs = Counted(2)
    for size in range(2 * MAX_SEEN):
        run(graphs, size)
    assert len(graphs.seen) <= MAX_SEEN
