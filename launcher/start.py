"""``install.py start``: the graph editor with the pack, in the foreground until it is stopped."""

import dataclasses
import os
import re
import sys
import threading
import urllib.parse
import webbrowser
from collections.abc import Mapping

from . import machine, preparation, server, shelf
from .home import DEFAULT_WORKFLOW, Home
from .preparation import Installation
from .python_probe import Facts
from .report import LauncherError, Steps


def start(
    home: Home,
    num_gpus: int | None,
    open_browser: bool,
    port: int,
    listen: str,
    comfyui: str | None,
    hosts: Mapping[str, str],
) -> None:
    """Set up what is missing and serve the editor until SIGINT or SIGTERM. ``hosts``: as ``hosts.told`` says.

    Raises LauncherError when the port is taken, fewer GPUs are visible than ``num_gpus``, or the server ends by itself.
    """
    server.check_port(listen, port)
    steps = Steps(preparation.STEPS + 3)
    installation = preparation.prepare(home, comfyui, steps)
    with steps.step("GPUs and memory") as step:
        environ = {**os.environ, **hosts}
        facts = installation.facts
        if num_gpus is not None:
            current = environ.get("CUDA_VISIBLE_DEVICES")
            environ["CUDA_VISIBLE_DEVICES"] = limit_gpus(current, len(facts.devices), num_gpus)
            facts = dataclasses.replace(facts, devices=facts.devices[:num_gpus])
        step.result = f"{len(facts.devices)} GPU(s)" if facts.devices else "no GPU"
        for line in describe(facts, environ, machine.memory()):
            step.note(line)
    with steps.step("Workflows for the editor") as step:
        target = installation.base / "user" / "default" / "workflows"
        written, kept = shelf.place(home.pack / "workflows", target, home.runtime / "shipped_workflows.json")
        step.result = f"{len(written)} new" if written else "already there"
        if kept:
            step.note(f"kept as you changed them: {', '.join(kept)}")
    steps.heading("Starting ComfyUI")
    tree = installation.host.tree
    arguments = installation.server_arguments
    with server.Server(installation.python, tree, arguments, listen, port, environ, log=None) as comfy:
        comfy.wait_until_ready()
        page = editor_url(comfy.url, home, installation)
        print(banner(comfy.url, listen, installation), flush=True)
        if open_browser and can_open_browser(environ):
            # In a thread: some browser commands return only when the browser is closed.
            threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()
        else:
            print(f"Default workflow: {page}", flush=True)
        comfy.process.wait()
        comfy.check_alive("by itself")


def limit_gpus(current: str | None, visible: int, wanted: int) -> str:
    """Return the CUDA_VISIBLE_DEVICES that keeps the first ``wanted`` of the ``visible`` GPUs.

    ``current`` is the variable's present value. Raises LauncherError for a number that is not there.
    """
    if wanted < 1 or wanted > visible:
        limited = f" (CUDA_VISIBLE_DEVICES={current})" if current is not None else ""
        raise LauncherError(
            f"--num_gpus {wanted}: {visible} GPU(s) are visible to torch{limited}",
            f"use a number from 1 to {visible}, or leave --num_gpus out"
            if visible
            else "leave --num_gpus out to run on the CPU, where num_gpus in the loader is a number of processes; or "
            "check nvidia-smi and that torch is a CUDA build",
        )
    names = [name.strip() for name in current.split(",")] if current else [str(index) for index in range(visible)]
    return ",".join(names[:wanted])


def describe(facts: Facts, environ: Mapping[str, str], memory: tuple[int, int] | None) -> list[str]:
    """Return the lines about devices and memory that stand above the server's output."""
    lines = [
        f"GPU {index}: {device.name}, {machine.gib(device.free)} free of {machine.gib(device.total)}"
        for index, device in enumerate(facts.devices)
    ]
    if facts.devices:
        lines.append(f"CUDA_VISIBLE_DEVICES={environ.get('CUDA_VISIBLE_DEVICES', '(not set: all GPUs)')}")
    elif facts.other_accelerators:
        lines.append(f"torch uses {', '.join(facts.other_accelerators)}; CUDA is not available")
    else:
        lines.append(f"CUDA is not available (torch {facts.torch}, {facts.build}): ComfyUI runs on the CPU.")
        lines.append("The demo checkpoint draws there; the full model is very slow and needs more than 20 GiB of RAM.")
    if memory is not None:
        lines.append(f"RAM: {machine.gib(memory[1])} available of {machine.gib(memory[0])}")
    return lines


def editor_url(url: str, home: Home, installation: Installation) -> str:
    """Return the address that opens the editor with the default workflow.

    The editor loads ``template`` of the pack ``source`` and accepts only these letters in both names.
    """
    has_workflow = (home.pack / "workflows" / f"{DEFAULT_WORKFLOW}.json").is_file()
    if not has_workflow or not re.fullmatch(r"[A-Za-z0-9_.-]+", installation.folder):
        return f"{url}/"
    return f"{url}/?" + urllib.parse.urlencode({"template": DEFAULT_WORKFLOW, "source": installation.folder})


def banner(url: str, listen: str, installation: Installation) -> str:
    lines = [
        "",
        f"The editor is ready: {url}",
        f"Pictures are saved in {installation.base / 'output'}",
        "To stop: press Ctrl-C here (or send SIGTERM to this process).",
    ]
    if listen not in ("127.0.0.1", "::1", "localhost"):
        lines.append(f"It listens at {listen}: ComfyUI has no password, everyone who reaches it can use it.")
    return "\n".join(lines)


def can_open_browser(environ: Mapping[str, str]) -> bool:
    """Whether opening a browser makes sense: on Linux that takes a display, or a program named by BROWSER."""
    if not sys.platform.startswith("linux"):
        return True
    return any(environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
