"""The life of a group of ranks, in real processes over gloo: work, faults of every kind, and its end.

All but the last share one process's groups: first one of which a device is broken, then the one that takes its place,
which each test leaves as it found it: well, or on its way to be.
"""

import contextlib
import dataclasses
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch

from zimage_turbo.engine.group import coordinator, loopback
from zimage_turbo.engine.group.coordinator import Group
from zimage_turbo.engine.group.current import Current
from zimage_turbo.engine.group.faults import GroupError, Refused
from zimage_turbo.engine.group.launch import Setup
from zimage_turbo.engine.group.team import Limits, Team

FAULTY = "tests.unit.engine.group.faulty"
SILENCE, STOP = 3.0, 2.0
LIMITS = Limits(start=120.0, silence=SILENCE, stop=STOP)
AMPLE = 120.0  # seconds, for what takes a moment, and a start of all ranks, on a busy machine
SETUP = Setup(("cpu", "cpu"), operations=(FAULTY,), body_limit=1 << 20, exchange_limit=60.0)
ONE_IS_BROKEN = dataclasses.replace(SETUP, devices=("cpu", "cuda:97"))


def everyone(request):
    return lambda size: dict.fromkeys(range(size), request)


@contextlib.contextmanager
def running(setup=SETUP, limits=LIMITS, **options):
    made = Group(setup, limits, **options)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def current():
    made = Current()
    yield made
    made.close()


@pytest.fixture(scope="module")
def group(current):
    return current.group(SETUP, LIMITS)


def processes(group):
    group.start()
    return {each["rank"]: psutil.Process(each["pid"]) for each in group.document()["ranks"]}


def begun(group, operation, request, until=lambda told: True):
    """A call on a thread of its own, once a rank has told of something. Returns how to get its outcome."""
    outcome, told = [], threading.Event()

    def on_progress(rank, message):
        if until(message):
            told.set()

    def call():
        try:
            outcome.append(group.call(operation, everyone(request), AMPLE, on_progress))
        except Exception as error:
            outcome.append(error)
            told.set()

    thread = threading.Thread(target=call)
    thread.start()
    assert told.wait(AMPLE)

    def result():
        thread.join(AMPLE)
        return outcome[0]

    return result


def gone(process, seconds=15.0):
    try:
        process.wait(seconds)
    except psutil.TimeoutExpired:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    return True


# --- Devices ---


def test_it_goes_on_with_the_devices_that_work(current, caplog):
    group = current.group(ONE_IS_BROKEN, LIMITS)
    with caplog.at_level(logging.WARNING):
        assert group.call("echo", everyone(None), AMPLE) == {0: {"rank": 0, "size": 1, "request": None}}
    state = current.document()
    assert state["state"] == coordinator.DEGRADED and state["asked"] == 2 and len(state["ranks"]) == 1
    assert "1 of 2 ranks ready" in state["reason"]
    assert "rank 1 (cuda:97) could not use its device" in state["reason"]
    assert any("1 of 2 ranks ready" in record.getMessage() for record in caplog.records)


def test_another_number_of_ranks_takes_the_place_of_the_first(current):
    one = current.group(ONE_IS_BROKEN, LIMITS)
    before = processes(one)
    assert current.group(ONE_IS_BROKEN, LIMITS) is one and len(before) == 1
    two = current.group(SETUP, LIMITS)
    assert gone(before[0], 0.1) and one.document()["state"] == coordinator.CLOSED
    assert set(two.call("echo", everyone(None), AMPLE)) == {0, 1}
    assert current.document()["state"] == coordinator.OK
    with pytest.raises(GroupError, match="was closed, or is used with other GPUs now"):
        one.call("echo", everyone(None), AMPLE)


def test_a_group_without_any_device_fails_and_says_why():
    with running(devices=lambda: ()) as made:
        with pytest.raises(GroupError, match="none of the devices asked for is there"):
            made.start()
        assert made.document()["state"] == coordinator.FAILED


@pytest.fixture
def failed_ahead():
    """A group whose start ahead found no device; there is one now."""
    there = []
    with running(devices=lambda: there) as made:
        made.begin()
        end = time.monotonic() + AMPLE
        while made.document()["state"] != coordinator.FAILED and time.monotonic() < end:
            time.sleep(0.01)
        there.append("cpu")
        yield made


def test_a_start_ahead_that_failed_is_told_to_who_asks_and_then_tried_again(failed_ahead):
    with pytest.raises(GroupError, match="none of the devices asked for is there"):
        failed_ahead.start()
    assert failed_ahead.start() == 1


def test_a_start_ahead_that_failed_long_ago_is_tried_again(failed_ahead, monkeypatch):
    monkeypatch.setattr(coordinator, "FRESH_SECONDS", 0.0)
    assert failed_ahead.start() == 1


def test_who_asks_where_ranks_are_need_not_wait_for_their_start():
    def interrupted():
        raise KeyboardInterrupt

    with running() as made:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            made.places(interrupted)
        assert time.monotonic() - began < 1.0
        assert len(made.places()) == 2 and made.document()["starts"] == 1


# --- Work ---


def test_nothing_runs_before_it_is_asked():
    with running() as made:
        state = made.document()
        assert (state["state"], state["ranks"], state["starts"]) == (coordinator.STARTING, [], 0)


def test_ranks_say_who_and_how_they_are(group):
    assert group.start() == 2
    state = group.document()
    assert state["state"] == coordinator.OK and "2 of 2 ranks ready" in state["reason"] and state["asked"] == 2
    assert [(rank["rank"], rank["device"]) for rank in state["ranks"]] == [(0, "cpu"), (1, "cpu")]
    assert all(rank["memory_mib"] > 50 and rank["pid"] != os.getpid() for rank in state["ranks"])


def test_each_rank_gets_its_own_request(group):
    x = torch.randn(3, 4)
    answers = group.call("echo", lambda size: {rank: {"x": x + rank} for rank in range(size)}, AMPLE)
    assert list(answers) == [0, 1]
    for rank, answer in answers.items():
        assert (answer["rank"], answer["size"]) == (rank, 2)
        assert torch.equal(answer["request"]["x"], x + rank)


def test_one_rank_can_be_asked_alone(group):
    assert group.call("echo", lambda size: {1: None}, AMPLE) == {1: {"rank": 1, "size": 2, "request": None}}


def test_ranks_exchange_among_each_other(group):
    assert all(answer["total"] == 3.0 for answer in group.call("meet", everyone({}), AMPLE).values())


def test_calls_at_once_take_turns(group):
    """Exchanges would never end if ranks were asked in different orders."""
    outcomes = []
    threads = [
        threading.Thread(target=lambda: outcomes.append(group.call("meet", everyone({}), AMPLE))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(AMPLE)
    assert len(outcomes) == 8


def test_progress_comes_as_it_is_made(group):
    told = []
    request = everyone({"steps": 3, "seconds": 0.0})
    group.call("steps", request, AMPLE, lambda rank, each: told.append((rank, each["step"])))
    assert [step for rank, step in told if rank == 0] == [step for rank, step in told if rank == 1] == [0, 1, 2]


def test_what_it_does_is_seen_while_it_does_it(group):
    result = begun(group, "steps", {"steps": 15, "seconds": 0.1})
    time.sleep(1.2)
    assert [rank["busy"]["operation"] for rank in group.document()["ranks"]] == ["steps", "steps"]
    assert set(result()) == {0, 1}


# --- Requests that are wrong ---


def test_a_wrong_request_is_the_askers_error_and_no_fault(group):
    starts = group.document()["starts"]
    with pytest.raises(Refused, match="seed is -1, but seeds begin at 0"):
        group.call("fail", everyone({"rank": 1, "errors": ["refused"]}), AMPLE)
    with pytest.raises(Refused, match="ranks know no operation 'paint', but: echo, "):
        group.call("paint", everyone({}), AMPLE)
    assert group.document()["state"] == coordinator.OK and group.document()["starts"] == starts


def test_a_request_over_the_limit_is_refused(group):
    with pytest.raises(Refused, match=r"is over the limit of 1048576 bytes\. Use fewer or smaller pictures"):
        group.call("echo", everyone({"x": "x" * (1 << 20)}), AMPLE)
    assert group.call("echo", everyone({"x": "x" * (1 << 19)}), AMPLE)


def test_large_tensors_are_shared_and_leave_nothing_open(group):
    group.start()
    sent, files = torch.randn(1 << 19), shared_files()
    for answer in group.call("echo", everyone({"x": sent}), AMPLE).values():  # twice what a request may have
        assert torch.equal(answer["request"]["x"], sent)
    assert shared_files() == files


def shared_files():
    """How many files this process shares now."""
    targets = (os.path.realpath(each) for each in Path("/proc/self/fd").iterdir())
    return sum(target.startswith("/memfd:z-image-turbo") for target in targets)


def test_a_stranger_is_refused(group):
    """Every port that the ranks hold answers those alone who know the token, which no command line shows."""
    found = processes(group)
    held = [each for process in found.values() for each in process.net_connections() if each.status == "LISTEN"]
    served = [each.laddr for each in held if loopback.FIRST_PORT <= each.laddr.port < loopback.FIRST_PORT + 1000]
    assert len(served) == 2 and all(address.ip == "127.0.0.1" for address in served)
    for address in served:
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"http://127.0.0.1:{address.port}/ping", timeout=AMPLE)
    token = found[0].environ()["ZIMAGE_GROUP_TOKEN"]
    parent = found[0].parent()
    assert all(token not in word for process in (parent, *found.values()) for word in process.cmdline())


# --- Cancel ---


def test_cancel_stops_between_steps(group):
    starts, seen = group.document()["starts"], []

    def check():
        if seen:
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        group.call("steps", everyone({"steps": 600, "seconds": 0.1}), AMPLE, lambda *told: seen.append(told), check)
    assert group.call("echo", everyone(None), AMPLE)  # waits its turn
    assert time.monotonic() - began < 20
    assert group.document()["starts"] == starts


def test_work_that_does_not_stop_is_ended_with_its_process(group):
    before, states = processes(group), []

    def check():
        states.append(group.document()["ranks"])
        if any(rank["busy"] and rank["busy"]["operation"] == "hang" for rank in states[-1]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        group.call("hang", everyone({"seconds": 3600}), AMPLE, check=check)
    assert group.call("echo", everyone(None), AMPLE)
    assert f"did not stop 'hang' within {STOP:g} s" in group.document()["last_fault"]["what"]
    assert all(gone(process) for process in before.values())


# --- Faults: the request is done all the same, by ranks that are started anew ---


def test_a_killed_rank(group, caplog):
    """Rank 1, which the other waits for, and hears of as soon; test_duties.py kills the other."""
    before = processes(group)
    with caplog.at_level(logging.WARNING):
        request = {"steps": 10, "seconds": 0.1, "together": True}
        result = begun(group, "steps", request, lambda told: told["step"] > 0)
        killed = time.monotonic()
        before[1].kill()
        deadline = killed + AMPLE
        while group.document()["state"] == coordinator.OK and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.monotonic() - killed < 3.0, "seen late"
        assert group.document()["state"] == coordinator.DEGRADED
        assert result() == {0: {"rank": 0}, 1: {"rank": 1}}
    assert group.document()["state"] == coordinator.OK
    assert "rank 1 (cpu) ended" in group.document()["last_fault"]["what"]
    assert [record.getMessage() for record in caplog.records if "multi-gpu: rank" in record.getMessage()]
    assert all(gone(process) for process in before.values())


def test_a_stopped_rank_is_a_hung_one(group):
    """What was kept is there again afterwards."""
    before = processes(group)
    group.keep("colour", "remember", {"key": "colour", "value": "red"}, AMPLE)
    group.keep("size", "remember", {"key": "size", "value": 1}, AMPLE)
    group.drop("size")
    result = begun(group, "steps", {"steps": 10, "seconds": 0.1}, lambda told: told["step"] > 0)
    before[1].send_signal(signal.SIGSTOP)
    assert result() == {0: {"rank": 0}, 1: {"rank": 1}}
    assert f"rank 1 (cpu) gave no sign of life for {SILENCE:g} s" in group.document()["last_fault"]["what"]
    assert group.call("recall", everyone({"key": "colour"}), AMPLE) == {0: "red", 1: "red"}
    assert group.call("recall", everyone({"key": "size"}), AMPLE) == {0: None, 1: None}
    assert all(gone(process) for process in before.values())


def test_a_rank_that_raises_and_then_runs_out_of_memory(group, tmp_path, caplog):
    """Once is made good, twice is the asker's error. The other rank waits for it in an exchange."""
    request = {"rank": 1, "errors": ["exception", "memory"], "marker": str(tmp_path / "times"), "together": True}
    with pytest.raises(GroupError) as raised, caplog.at_level(logging.WARNING):
        group.call("fail", everyone(request), AMPLE)
    assert "multi-gpu: rank 1 (cpu) raised KeyError: 'lost'. The ranks are ended." in caplog.text
    assert "in fail" in caplog.text, "the traceback is in the log"
    text = str(raised.value)
    assert text.startswith("'fail' failed on several GPUs, twice: rank 1 (cpu) ran out of memory: CUDA out of memory.")
    assert "Choose precision int4" in text
    assert group.call("fail", everyone(request), AMPLE) == {0: {"rank": 0}, 1: {"rank": 1}}


def test_an_operation_beyond_its_time(group, tmp_path):
    request = {"seconds": 3600, "marker": str(tmp_path / "once"), "rank": 1}
    assert group.call("hang", everyone(request), 1.0) == {0: None, 1: None}
    assert "rank 1 (cpu) took longer than 1 s for 'hang'" in group.document()["last_fault"]["what"]


# --- The end ---


def test_closing_leaves_nothing(current):
    process = psutil.Process()
    group = current.group(SETUP, LIMITS)
    ranks = processes(group)
    files, threads, everything = process.num_fds(), threading.active_count(), [ranks[0].parent(), *ranks.values()]
    current.close()
    assert all(gone(each) for each in everything) and group.document()["state"] == coordinator.CLOSED
    assert current.document() is None
    assert process.num_fds() < files and threading.active_count() < threads
    gc.collect()
    teams = [each for each in gc.get_objects() if type(each) is Team]
    assert len(teams) <= 1, "at most the last, which the closed group may have; none of those that failed before"


COORDINATOR = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import conftest
from zimage_turbo.engine.group.coordinator import Group
from zimage_turbo.engine.group.launch import Setup

group = Group(Setup(("cpu", "cpu"), operations=(sys.argv[2],)))
"""
WORKING = """
group.start()
print(*(rank["pid"] for rank in group.document()["ranks"]), flush=True)
group.call("hang", lambda size: dict.fromkeys(range(size), {"seconds": 3600}), 3600)
"""
STARTING = """
threading.Thread(target=group.start, daemon=True).start()
print(flush=True)
time.sleep(3600)
"""


def another_coordinator(pack, does):
    command = [sys.executable, "-c", COORDINATOR + does, str(pack / "tests"), FAULTY]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_no_process_outlives_the_coordinator(pack):
    """Not even one that is stopped, and could not look."""
    with another_coordinator(pack, WORKING) as coordinator:
        ranks = [psutil.Process(int(pid)) for pid in coordinator.stdout.readline().split()]
        everything = psutil.Process(coordinator.pid).children(recursive=True)
        assert len(ranks) == 2 and set(ranks) < set(everything) and len(everything) == 3
        ranks[1].send_signal(signal.SIGSTOP)
        coordinator.kill()
    assert [process.pid for process in everything if not gone(process)] == []


def test_ctrl_c_while_ranks_start_leaves_nothing(pack):
    """Nor does the coordinator wait for them."""
    with another_coordinator(pack, STARTING) as coordinator:
        coordinator.stdout.readline()
        deadline = time.monotonic() + AMPLE
        while len(everything := psutil.Process(coordinator.pid).children(recursive=True)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        coordinator.send_signal(signal.SIGINT)
        coordinator.wait(15)
    assert [process.pid for process in everything if not gone(process)] == []
