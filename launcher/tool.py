"""Runs a command-line tool of the set-up (pip, venv, apt-get), keeps its output in a log and its end for an error."""

import collections
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .report import LauncherError

TAIL_LINES = 15


def run_tool(
    command: Sequence[str | Path],
    log: Path,
    reason: str,
    remedy: str,
    live: Callable[[str], None] = lambda line: None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run ``command`` to its end; append its output to ``log`` and hand each line to ``live``.

    Raises LauncherError with the last lines of output when the command cannot be started or does not exit with 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in command]
    tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
    with open(log, "a", encoding="utf-8") as file:
        file.write("$ " + " ".join(words) + "\n")
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=env,
            )
        except OSError as error:
            raise LauncherError(f"{reason}: {words[0]} could not be started ({error})", remedy) from error
        try:
            for line in process.stdout:
                file.write(line)
                tail.append(line.rstrip())
                live(line)
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code != 0:
        raise LauncherError(f"{reason} (exit code {code}; full output in {log})", remedy, "\n".join(tail))
