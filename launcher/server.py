"""Starts a ComfyUI server, waits until it answers, and ends it together with everything it started."""

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from .report import LauncherError

# Long enough for a ComfyUI with a hundred other packs on a slow disk.
READY_TIMEOUT = 600.0
STOP_TIMEOUT = 15.0
LOG_TAIL_LINES = 25

# A proxy from the environment must not stand between us and our own loopback server.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    """Return a loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(listen: str, port: int) -> None:
    """Raise LauncherError when ``port`` cannot be opened at the address ``listen``."""
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    with socket.socket(family) as probe:
        if os.name != "nt":
            # As the server does: a port whose last connections are only fading out is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((listen, port))
        except (OSError, OverflowError) as error:
            raise _port_error(listen, port, error) from error


def _port_error(listen: str, port: int, error: Exception) -> LauncherError:
    code = getattr(error, "errno", None)
    if code == errno.EADDRINUSE:
        return LauncherError(
            f"port {port} is already used by another program (perhaps this editor is already running)",
            f"open http://{reachable(listen)}:{port} to see, or choose another port, for example --port {free_port()}",
        )
    if code in (errno.EADDRNOTAVAIL, None) or isinstance(error, socket.gaierror):
        return LauncherError(
            f"--listen {listen} with --port {port} is not an address of this machine ({error})",
            "use --listen 127.0.0.1 for this machine only, 0.0.0.0 for every network, and a port from 1024 to 65535",
        )
    return LauncherError(
        f"port {port} at {listen} cannot be opened ({error})", f"choose another port, for example --port {free_port()}"
    )


def reachable(listen: str) -> str:
    """Return the address a browser on this machine uses for a server that listens at ``listen``."""
    if listen in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{listen}]" if ":" in listen else listen


def fetch(url: str, timeout: float = 60.0) -> bytes:
    """GET ``url`` without a proxy. Raises OSError (urllib.error.URLError is one) when there is no answer."""
    with _direct.open(url, timeout=timeout) as answer:
        return answer.read()


def fetch_json(url: str, timeout: float = 60.0) -> dict:
    return json.loads(fetch(url, timeout))


# CUDA graphs share a memory pool, which only torch's own allocator has.
OPTIONS = ("--disable-auto-launch", "--disable-cuda-malloc")


class Server:
    """A running ComfyUI. ``log`` is its output file; None lets it write to our terminal."""

    def __init__(
        self,
        python: Path,
        tree: Path,
        arguments: Sequence[str | Path],
        listen: str,
        port: int,
        env: Mapping[str, str],
        log: Path | None,
    ) -> None:
        self.url = f"http://{reachable(listen)}:{port}"
        self.log = log
        command = [python, "-u", "main.py", "--listen", listen, "--port", port, *OPTIONS, *arguments]
        with contextlib.ExitStack() as stack:
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
            output = stack.enter_context(open(log, "wb")) if log is not None else None
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=tree,
                # main.py imports its neighbours, which this variable would forbid.
                env={key: value for key, value in env.items() if key != "PYTHONSAFEPATH"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                # A group of its own: Ctrl-C reaches us alone, and we end the server with all it started.
                start_new_session=os.name != "nt",
                creationflags=subprocess.CREATE_NEW_PROCESS_GROUP if os.name == "nt" else 0,
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Return when the server answers. Raises LauncherError when it ends or ``timeout`` seconds pass first."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.check_alive("during its start")
            try:
                fetch(f"{self.url}/system_stats", timeout=10)
                return
            except OSError:
                time.sleep(0.1)
        raise LauncherError(
            f"ComfyUI did not answer at {self.url} within {timeout:.0f} s",
            "look for the pack that holds it up in the output above, or start that ComfyUI by hand to see",
            self.log_tail(),
        )

    def check_alive(self, when: str) -> None:
        """Raise LauncherError with the end of the log when the process has ended."""
        code = self.process.poll()
        if code is not None:
            raise LauncherError(
                f"ComfyUI ended {when} (exit code {code})",
                f"the end of its output says why; all of it is in {self.log}" if self.log else "see its output above",
                self.log_tail(),
            )

    def log_tail(self) -> str:
        if self.log is None:
            return ""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def stop(self) -> None:
        """Ask the server to end, wait, then kill what is left of its process group. A second Ctrl-C kills at once."""
        try:
            if self.process.poll() is None:
                self._terminate()
                self.process.wait(STOP_TIMEOUT)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass  # patience is over: the group is killed below
        finally:
            self._kill_group()

    def _terminate(self) -> None:
        if os.name == "nt":
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(self.process.pid)], capture_output=True)
        else:
            self.process.send_signal(signal.SIGTERM)

    def _kill_group(self) -> None:
        if os.name == "nt":
            self.process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):  # the usual case: nothing is left
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
