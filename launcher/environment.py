"""The launcher's own virtual environment, and the choice of Python when the user's ComfyUI already has one."""

import os
import platform
import sys
from pathlib import Path

from . import machine, pyproject, python_probe, stamp, versions
from .comfyui import Host, is_tree
from .home import Home, venv_program
from .python_probe import INSIDE, Facts
from .report import Step
from .tool import run_tool

TORCH = "2.13.0"
# torchvision 0.28.0 pins this torch; leaving it or torchaudio open would let pip replace torch by a newer one.
TORCH_FAMILY = ("torchvision==0.28.0", "torchaudio==2.11.0")


def torch_pins(has_nvidia_driver: bool) -> list[str]:
    """Return the pip requirements of torch's three packages.

    pip prefers ``2.13.0+cpu`` to ``2.13.0`` where an index offers both: wanted without an NVIDIA driver (10 times
    smaller), excluded with one.
    """
    exclude_cpu = f",!={TORCH}+cpu" if has_nvidia_driver else ""
    return [f"torch=={TORCH}{exclude_cpu}", *TORCH_FAMILY]


def user_pythons(tree: Path) -> list[Path]:
    """Return the Pythons that a user's ComfyUI may run with, the running one first, only those that exist."""
    folders = [tree / "venv", tree / ".venv"]
    embedded = tree.parent / "python_embeded" / "python.exe"  # the spelling of ComfyUI's portable Windows build
    candidates = [Path(sys.executable), *(venv_program(folder, "python") for folder in folders), embedded]
    return [python for python in candidates if python.is_file()]


def find_user_python(host: Host) -> Facts | None:
    """Return the first of the user's Pythons that has torch and every package of ComfyUI, or None."""
    if host.owned:
        return None
    for python in user_pythons(host.tree):
        facts = python_probe.ask(python, host.requirements)
        if facts.runs_comfyui:
            return facts
    return None


def create(home: Home, step: Step) -> Path:
    """Make the virtual environment unless a finished one is there; return its Python.

    An environment whose packages were never finished is made anew: pip takes a half-written package for installed.
    """
    python = venv_program(home.venv, "python")
    if packages_stamp(home).is_file() and python.is_file():
        step.result = "already there"
        return python
    run_tool(
        [sys.executable, "-m", "venv", "--clear", home.venv],
        home.logs / "venv.log",
        f"a virtual environment could not be made in {home.venv}",
        "install Python's venv module (on Debian and Ubuntu: apt-get install python3-venv), then run the same command",
        step.live,
    )
    step.note(f"Python {platform.python_version()} in {home.venv}")
    return python


def packages_stamp(home: Home) -> Path:
    return home.venv / "zimage-packages.json"


def is_finished(home: Home) -> bool:
    """Whether a set-up for this Python was brought to its end, with a ComfyUI of its own."""
    python = venv_program(home.venv, "python")
    return packages_stamp(home).is_file() and python.is_file() and is_tree(home.comfyui)


def install_packages(home: Home, host: Host, python: Path, has_nvidia_driver: bool, step: Step) -> None:
    """Install torch, ComfyUI's requirements and the pack's own dependencies, all in one resolution of pip."""
    pins = torch_pins(has_nvidia_driver) + pyproject.read(home.pack / "pyproject.toml", "project", "dependencies")
    record = {"pins": pins, "requirements": stamp.digest(host.requirements)}
    mark = packages_stamp(home)
    if stamp.is_current(mark, record):
        step.result = "already there"
        return
    stamp.clear(mark)
    _pip_install(home, python, [*pins, "-r", host.requirements], "torch and ComfyUI's packages", step)
    if not has_nvidia_driver:
        run_tool(
            [python, INSIDE / "cpu_extras.py"],
            home.logs / "pip.log",
            "torchvision and torchaudio could not be made to work beside this build of torch",
            f"delete {home.venv} and run the same command again",
            step.live,
        )
    stamp.write(mark, record)


def install_test_packages(home: Home, python: Path, step: Step) -> None:
    """Install what the tests need on top, as pinned in pyproject.toml."""
    pins = pyproject.read(home.pack / "pyproject.toml", "project.optional-dependencies", "test")
    mark = home.venv / "zimage-test-packages.json"
    record = {"pins": pins, "packages": stamp.digest(packages_stamp(home))}
    if stamp.is_current(mark, record):
        step.result = "already there"
        return
    stamp.clear(mark)
    _pip_install(home, python, pins, "the test packages", step)
    stamp.write(mark, record)


def _pip_install(home: Home, python: Path, requirements: list[str | Path], what: str, step: Step) -> None:
    options = ["--no-input", "--disable-pip-version-check"]
    # Compiling all 16,000 modules takes half of pip's time, and Python compiles those it imports, if it may keep them.
    options += [] if sys.dont_write_bytecode else ["--no-compile"]
    run_tool(
        [python, "-m", "pip", "install", *options, *requirements],
        home.logs / "pip.log",
        f"pip could not install {what}",
        "check the network, pip's index settings ('pip config list') and the free disk space "
        f"({machine.gib(machine.free_disk(home.runtime))} free), then run the same command again; finished steps stay",
        step.live,
    )
    step.result = "installed"


def path_with(python: Path, environ: dict[str, str]) -> dict[str, str]:
    """Return ``environ`` with the folder of ``python`` first on PATH, as an activated environment has it."""
    return {**environ, "PATH": os.pathsep.join([str(python.parent), environ.get("PATH", "")])}


def pack_problems(pack: Path) -> list[str]:
    """Say which of the pack's own dependencies the running Python lacks."""
    wanted = pyproject.read(pack / "pyproject.toml", "project", "dependencies")
    return [problem for line in wanted if (problem := versions.installed_problem(line))]
