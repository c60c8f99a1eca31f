"""The processes of a group: torchrun as one child of this process, the ranks as torchrun's."""

import contextlib
import json
import logging
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path

import folder_paths
import psutil

from . import loopback
from .faults import GroupError
from .hosts import TOKEN, Hosts
from .shared import Reference

INSIDE = Path(__file__).resolve().parent.parent.parent / "launcher" / "inside"
PACKAGE = __package__.rsplit(".", 2)[0]
DUTIES = "engine.duties"
TAIL_LINES = 40
GRACE_SECONDS = 1.0
UNKILLABLE_SECONDS = 10.0
LOOK_SECONDS = 0.02
QUIET_SECONDS = 0.1
SAID = re.compile(r"rank \d+ (INFO|WARNING): ")
MONITOR_SECONDS = 1  # torchrun ends all ranks when one has ended: later than we see which one it was


@dataclass(frozen=True)
class Setup:
    """What every rank is told.

    devices: of this machine's ranks, 'cuda:N' as this process counts, or all 'cpu'. options: of ComfyUI's command line.
    operations: modules of the pack whose OPERATIONS ranks know. first_port: where ranks look for free ports;
    body_limit: bytes of a message; exchange_limit: seconds of one exchange between ranks.
    """

    devices: tuple[str, ...]
    options: tuple[str, ...] = ()
    operations: tuple[str, ...] = (DUTIES,)
    first_port: int = loopback.FIRST_PORT
    body_limit: int = 2 << 30
    exchange_limit: float = 120.0
    hosts: Hosts | None = None
    package: str = field(default=PACKAGE, init=False)  # by whose name Triton finds kernels that this process compiled

    @property
    def address(self) -> str:
        return self.hosts.address if self.hosts else loopback.ADDRESS


class Processes:
    """A start of torchrun. `tail`: the last lines that all of them printed, but for what is said in passing."""

    def __init__(self, setup: Setup, token: str, report_to: str, probe: Reference | None):
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._agent = subprocess.Popen(
            command(setup),
            env=environment(setup, token, report_to, probe),
            stdin=subprocess.PIPE,  # never written to: see launcher/inside/lifeline.py
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="group-output", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for raw in self._agent.stdout:
            line = raw.decode(errors="replace").rstrip()
            said = SAID.match(line)
            if said and said[1] == "INFO":
                logging.debug("Z-Image-Turbo: %s", line)
                continue
            self.tail.append(line)
            if said and said[1] == "WARNING":  # an error is a fault, which is told of with the tail
                logging.warning("Z-Image-Turbo: %s", line)

    def last_lines(self) -> list[str]:
        """`tail`, once no more comes: a rank prints why it fails before it tells us, which may arrive first."""
        lines, before, deadline = list(self.tail), None, time.monotonic() + GRACE_SECONDS
        while lines != before and time.monotonic() < deadline:
            time.sleep(QUIET_SECONDS)
            lines, before = list(self.tail), lines
        return lines

    def exit_code(self) -> int | None:
        """torchrun's; None while it runs."""
        return self._agent.poll()

    def end(self, ranks: list[psutil.Process]) -> None:
        """End torchrun, and by SIGKILL all ranks, which have nothing to put in order. ranks: those on this machine.

        Waits for them; no longer than UNKILLABLE_SECONDS for those that a driver holds even then.
        """
        left = set(ranks)
        if self.exit_code() is None:
            left |= set(psutil.Process(self._agent.pid).children(recursive=True))
            self._agent.terminate()
        for process in left:  # before torchrun, which can then reap them: not every machine has somebody else who does
            with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._agent.wait(GRACE_SECONDS)
        self._agent.kill()
        held = _still_there(left, UNKILLABLE_SECONDS)
        self._agent.stdin.close()
        if held:
            pids = ", ".join(str(process.pid) for process in held)
            logging.error("Z-Image-Turbo: processes %s cannot be ended; what they hold of GPUs is not free.", pids)
            return
        self._agent.wait()
        self._reader.join()
        self._agent.stdout.close()


def _still_there(processes: Collection[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that have not ended after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := [each for each in processes if not _ended(each)]) and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    return left


def _ended(process: psutil.Process) -> bool:
    """Also a zombie, which only waits for somebody to ask for its exit code."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def new_token(setup: Setup) -> str:
    """Of one start; of several machines the one that they were given. Raises GroupError where there is none."""
    if not setup.hosts:
        return secrets.token_urlsafe()
    if not os.environ.get(TOKEN):
        raise GroupError(f"multi-gpu on several machines needs the same secret in {TOKEN} on each, and it is not set.")
    return os.environ[TOKEN]


def command(setup: Setup) -> list[str]:
    """torchrun, with one rank for each device."""
    shape = ["--local-addr", setup.address, "--nproc-per-node", str(len(setup.devices))]
    if setup.hosts:  # else torchrun asks the machine's name for its address, which may be loopback's
        shape += ["--rdzv-conf", "is_host=1"]
    return [sys.executable, "-u", str(INSIDE / "agent.py"), *torchrun_options(setup), *shape, str(INSIDE / "rank.py")]


def torchrun_options(setup: Setup) -> list[str]:
    """Those that are the same on every machine."""
    options = ["--max-restarts", "0", "--monitor-interval", str(MONITOR_SECONDS)]
    if not setup.hosts:
        return ["--standalone", *options]
    endpoint = f"{setup.hosts.address}:{setup.hosts.rendezvous}"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "z-image-turbo", "--rdzv-endpoint", endpoint]
    return ["--nnodes", str(setup.hosts.count), *meeting, *options]


def told(setup: Setup, report_to: str, probe: Reference | None) -> dict:
    """What every rank is told. probe: of shared memory, for ranks to see whether they can open it."""
    about = {"address": setup.address, "report_to": report_to}
    return asdict(setup) | about | {"probe": asdict(probe) if probe else None}


def comfyui() -> str:
    """The host's tree."""
    return str(Path(folder_paths.__file__).parent)


def environment(setup: Setup, token: str, report_to: str, probe: Reference | None) -> dict[str, str]:
    """This process's own, with what ranks are told; the token is nowhere else. What a rank can choose before it has
    torch, it does by itself, on other machines too."""
    # The programs in launcher/inside import their neighbours, which PYTHONSAFEPATH would forbid.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return inherited | {
        "ZIMAGE_GROUP": json.dumps(told(setup, report_to, probe)),
        TOKEN: token,
        "ZIMAGE_COMFYUI": comfyui(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // len(setup.devices))),
        # oneDNN keeps something for every size of picture, and glibc a heap for every thread: both kept ranks on a
        # processor from giving memory back, up to twice their size. Decoding takes a few per cent longer so.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0"),
        "MALLOC_ARENA_MAX": os.environ.get("MALLOC_ARENA_MAX", "1"),
    }


def _cores() -> int:
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1
