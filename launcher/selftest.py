"""``install.py test``: set everything up and run the pack's tests."""

import os
import signal
import subprocess

from . import chromium, environment, machine, preparation
from .home import Home, venv_program
from .report import Steps

MOST_PROCESSES = 4  # each takes up to 3 GB


def test(home: Home, arguments: list[str]) -> int:
    """Run pytest with ``arguments`` in the launcher's environment; return its exit code.

    Raises LauncherError when the set-up fails.
    """
    steps = Steps(preparation.STEPS + 3)
    installation = preparation.prepare(home, None, steps, for_tests=True)
    with steps.step("Test packages") as step:
        environment.install_test_packages(home, installation.python, step)
    with steps.step("Chromium") as step:
        browser = chromium.ensure(home, os.environ, step)
    env = environment.path_with(installation.python, dict(os.environ))
    env["ZIMAGE_COMFYUI"] = str(installation.host.tree)
    if browser is not None:
        env["CHROMIUM"] = browser
    steps.heading("Tests")
    # The script, not "python -m pytest": that would put the pack's folder on sys.path, where our "nodes" and "server"
    # would hide ComfyUI's.
    processes = 0 if machine.nvidia() else min(MOST_PROCESSES, os.cpu_count() or 1)  # a GPU's memory is for one
    if processes:
        env.setdefault("OMP_NUM_THREADS", "1")  # more threads than cores wait for each other
    side_by_side = ["--numprocesses", str(processes), "--dist", "loadfile", "--no-loadscope-reorder"]
    command = [str(venv_program(home.venv, "pytest")), *side_by_side, *with_place(arguments)]
    process = subprocess.Popen(command, cwd=home.pack, env=env)
    # Pytest must live to stop the servers it started: Ctrl-C reaches it by the terminal, SIGTERM through us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGINT))
    return process.wait()


def with_place(arguments: list[str]) -> list[str]:
    """Run all tests unless the arguments name some of them."""
    named = any(argument.startswith("tests") for argument in arguments)
    return arguments if named else ["tests", *arguments]
