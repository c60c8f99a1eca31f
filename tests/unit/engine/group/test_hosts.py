"""A group over several machines, here two addresses of one: torchrun's rendezvous joins their ranks."""

import contextlib
import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from zimage_turbo.engine import multi
from zimage_turbo.engine.group import coordinator
from zimage_turbo.engine.group.coordinator import Group
from zimage_turbo.engine.group.faults import GroupError
from zimage_turbo.engine.group.launch import Hosts, Setup
from zimage_turbo.engine.group.team import Limits
from zimage_turbo.launcher import hosts
from zimage_turbo.launcher.server import free_port

FAULTY = "tests.unit.engine.group.faulty"
AMPLE = 120.0


def everyone(request):
    return lambda size: dict.fromkeys(range(size), request)


@pytest.fixture
def setup(monkeypatch):
    """As `install.py start --hosts 2 --address 127.0.0.1` has it, but for free ports."""
    monkeypatch.setenv("ZIMAGE_GROUP_TOKEN", "known to both machines")
    told = hosts.told(2, "127.0.0.1", os.environ)
    found = dataclasses.replace(Hosts.of(os.environ | told), rendezvous=free_port())
    return Setup(("cpu",), operations=(FAULTY,), first_port=free_port(), hosts=found)


@contextlib.contextmanager
def other_machine(setup, token="known to both machines"):
    node = hosts.command(Path(sys.executable), f"http://127.0.0.1:{setup.first_port}", "127.0.0.2", ["cpu"])
    with subprocess.Popen(node, env=os.environ | {"ZIMAGE_GROUP_TOKEN": token}, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                for each in (*psutil.Process(process.pid).children(recursive=True), process):
                    each.kill()


def test_two_machines(setup):
    with other_machine(setup) as node, contextlib.closing(Group(setup, Limits(start=AMPLE))) as group:
        assert all(answer["total"] == 3.0 for answer in group.call("meet", everyone({}), AMPLE).values())
        state = group.document()
        assert state["state"] == coordinator.OK and "2 of 2 ranks ready" in state["reason"]
        assert sorted(multi._islands(group)) == [[0], [1]], "no picture is split over machines"
        ((there, process),) = elsewhere(state, node)
        process.kill()
        assert set(group.call("echo", everyone(None), AMPLE)) == {0, 1}, "the other machine's ranks come back"
        assert f"rank {there} (cpu at 127.0.0.2)" in group.document()["last_fault"]["what"]
        ((_, process),) = elsewhere(group.document(), node)
        group.close()
        psutil.wait_procs([process], timeout=AMPLE)
        assert not process.is_running() and node.poll() is None, "its ranks end with the group, and it waits"


def elsewhere(state, node):
    """Numbers and processes of the ranks that the other machine runs."""
    found = [(rank["rank"], psutil.Process(rank["pid"])) for rank in state["ranks"] if "127.0.0.2" in rank["device"]]
    assert all(node.pid in (parent.pid for parent in process.parents()) for _, process in found)
    return found


def test_a_machine_with_another_token_is_told(setup):
    group, errors = Group(setup, Limits(start=AMPLE)), []

    def start():
        with pytest.raises(GroupError) as raised:
            group.start()
        errors.append(str(raised.value))

    starting = threading.Thread(target=start)
    starting.start()
    with other_machine(setup, "guessed") as node:
        assert node.wait(AMPLE) == 1
        assert b"ZIMAGE_GROUP_TOKEN differs on the two machines" in node.stderr.read()
    group.close()
    starting.join(AMPLE)
    assert errors == ["multi-gpu was closed, or is used with other GPUs now. Queue the prompt again."]


def test_no_token_for_several_machines(setup, monkeypatch):
    monkeypatch.delenv("ZIMAGE_GROUP_TOKEN")
    with contextlib.closing(Group(setup)) as group, pytest.raises(GroupError, match="needs the same secret"):
        group.start()
