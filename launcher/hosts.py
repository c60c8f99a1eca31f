"""Several machines for multi-gpu: what ComfyUI is told of them, and what runs on those that join it."""

import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from . import preparation
from .home import Home
from .python_probe import INSIDE, Facts
from .report import LauncherError, Steps
from .start import limit_gpus

COUNT, ADDRESS, TOKEN = "ZIMAGE_GROUP_HOSTS", "ZIMAGE_GROUP_ADDRESS", "ZIMAGE_GROUP_TOKEN"
WITHOUT_GPUS = 2  # processes, as multi-gpu starts there


def told(count: int | None, address: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that tell ComfyUI of ``--hosts`` and ``--address``; none without these options.

    Raises LauncherError for what cannot be, and where ``environ`` has no token.
    """
    if count is None and address is None:
        return {}
    if count is None or address is None:
        raise LauncherError(
            f"--hosts is {count or 'missing'}, --address {address or 'missing'}: they belong together",
            "give both, for example --hosts 2 --address 10.0.0.1, or neither to use this machine alone",
        )
    if count < 2:
        raise LauncherError(
            f"--hosts {count}: it is how many machines share the work", "give 2 or more, or leave it out"
        )
    check(address, environ)
    return {COUNT: str(count), ADDRESS: address}


def check(address: str, environ: Mapping[str, str]) -> None:
    """Raise LauncherError where ``address`` is none of this machine's, or ``environ`` has no token."""
    try:
        if address in ("0.0.0.0", "::"):
            raise OSError("it names no machine")
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError as error:
        raise LauncherError(
            f"--address {address} is no IPv4 address of this machine ({error})",
            "give the one by which the other machines reach this one; 'ip address' lists them",
        ) from error
    if not environ.get(TOKEN):
        raise LauncherError(
            f"{TOKEN} is not set: without it, every machine of the network could use this one",
            f"make one with: python -c 'import secrets; print(secrets.token_urlsafe())' and set {TOKEN} to it on "
            "every machine",
        )


def join(home: Home, url: str, address: str, num_gpus: int | None, comfyui: str | None) -> NoReturn:
    """Set up what is missing, then lend this machine's GPUs to the ComfyUI at ``url`` until SIGINT or SIGTERM.

    Raises LauncherError for what the user has to act on.
    """
    if not re.match(r"http://[^/]+:\d+$", url):
        raise LauncherError(f"'{url}' is no URL of a group", "take the one that the other machine's log says")
    check(address, os.environ)
    steps = Steps(preparation.STEPS + 1)
    installation = preparation.prepare(home, comfyui, steps)
    devices = lent(installation.facts, num_gpus, os.environ)
    steps.heading(f"Lending {', '.join(devices)} to {url} (to stop: press Ctrl-C)")
    environ = {**os.environ, "ZIMAGE_COMFYUI": str(installation.host.tree)}
    # A session of its own: Ctrl-C reaches us alone. What it started ends with it.
    with subprocess.Popen(
        command(installation.python, url, address, devices), env=environ, start_new_session=True
    ) as node:
        try:
            code = node.wait()
        finally:
            node.terminate()
    raise LauncherError(f"joining {url} ended (exit code {code})", "see the lines above")


def lent(facts: Facts, num_gpus: int | None, environ: Mapping[str, str]) -> list[str]:
    """The first GPUs, all without a number; without GPUs the processor. Raises LauncherError for too many."""
    if num_gpus is not None:
        limit_gpus(environ.get("CUDA_VISIBLE_DEVICES"), len(facts.devices), num_gpus)
    count = num_gpus or len(facts.devices)
    return [f"cuda:{index}" for index in range(count)] or ["cpu"] * WITHOUT_GPUS


def command(python: Path, url: str, address: str, devices: Sequence[str]) -> list[str]:
    node = [str(python), "-u", str(INSIDE / "node.py"), url]
    return [*node, "--address", address, "--devices", ",".join(devices)]
