"""Finds the Chromium that the browser tests drive, and installs it where that is one command."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from .home import Home
from .report import LauncherError, Step
from .tool import run_tool

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find(environ: Mapping[str, str]) -> str | None:
    """Return the program named by CHROMIUM, else the first one on PATH. Raises LauncherError for a wrong CHROMIUM."""
    named = environ.get("CHROMIUM")
    if named:
        program = shutil.which(named)
        if program is None:
            raise LauncherError(
                f"CHROMIUM={named} is not a program", "set CHROMIUM to the path of Chromium or Chrome, or unset it"
            )
        return program
    return next(filter(None, map(shutil.which, NAMES)), None)


def is_debian(os_release: str) -> bool:
    """Whether the text of /etc/os-release is Debian's (Ubuntu's chromium package is a stub for another installer)."""
    return "ID=debian" in os_release.splitlines()


def ensure(home: Home, environ: Mapping[str, str], step: Step) -> str | None:
    """Return a Chromium, installing Debian's package as root if there is none. None with a note when it cannot."""
    program = find(environ)
    if program is not None:
        step.result = "already there"
        step.note(program)
        return program
    os_release = Path("/etc/os-release")
    debian = os_release.is_file() and is_debian(os_release.read_text(encoding="utf-8"))
    if not debian or os.geteuid() != 0:
        step.result = "not found"
        step.note("the browser tests will be skipped: install Chromium (or Chrome) or set CHROMIUM to its path")
        return None
    quiet = {**environ, "DEBIAN_FRONTEND": "noninteractive"}
    remedy = "install Chromium by hand or set CHROMIUM to its path, then run the same command again"
    install = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
    for command in (["apt-get", "update"], install):
        run_tool(command, home.logs / "apt.log", "Chromium could not be installed", remedy, step.live, quiet)
    return find(environ)
