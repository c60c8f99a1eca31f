"""Brings a machine from nothing to a ComfyUI that holds the pack; what is there already is kept."""

import dataclasses
from pathlib import Path

from . import comfyui, environment, lock, machine, pack_link, python_probe
from .comfyui import Host
from .home import Home
from .python_probe import Facts
from .report import Step, Steps

STEPS = 4
NO_GPU_USED = (
    "this machine has an NVIDIA driver, but this torch cannot use it: install a CUDA build of torch "
    "(see PyTorch's installation page) or a newer driver"
)


@dataclasses.dataclass(frozen=True)
class Installation:
    """A ComfyUI that can be started. ``folder`` is the pack's name in its custom_nodes."""

    host: Host
    python: Path
    facts: Facts
    base: Path
    folder: str

    @property
    def server_arguments(self) -> list[str | Path]:
        """Arguments of main.py that this installation always needs."""
        arguments: list[str | Path] = ["--cpu"] if self.facts.on_cpu else []
        if self.host.owned:
            # Without its own address the database would lie in the tree, which is replaced when its version changes.
            database = f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}"
            arguments += ["--base-directory", self.base, "--database-url", database]
        return arguments


def prepare(home: Home, comfyui_path: str | None, steps: Steps, for_tests: bool = False) -> Installation:
    """Do the four steps every command shares; raises LauncherError when one fails.

    A user's ComfyUI is run with the Python it has, when that one is complete. Tests always get the launcher's own
    environment, because they need packages that a user's environment must not get from us.
    """
    host = comfyui.choose(home, comfyui_path)
    with lock.exclusive(home.runtime / "setup.lock"):
        with steps.step("Python environment") as step:
            users = None if for_tests else environment.find_user_python(host)
            python = users.executable if users else environment.create(home, step)
            if users:
                step.result = "that of your ComfyUI"
                step.note(f"Python {users.python} in {python}")
        with steps.step("ComfyUI") as step:
            if host.owned:
                comfyui.fetch(home, python, step)
            step.note(f"version {comfyui.check_version(home.pack, host.tree)} in {host.tree}")
        facts = _check_packages(users, steps) if users else _install_packages(home, host, python, steps)
        with steps.step("Pack in custom_nodes") as step:
            base = host.base(home)
            if host.owned:
                (base / "user").mkdir(parents=True, exist_ok=True)
            folder, linked = pack_link.ensure(base / "custom_nodes", home.pack)
            step.result = "linked" if linked else "already there"
            step.note(f"{base / 'custom_nodes' / folder}")
    return Installation(host, python, facts, base, folder)


def _install_packages(home: Home, host: Host, python: Path, steps: Steps) -> Facts:
    has_driver = machine.nvidia() is not None
    build = "for NVIDIA GPUs" if has_driver else "for the CPU"
    with steps.step(f"Installing torch {environment.TORCH} {build} and ComfyUI's packages") as step:
        environment.install_packages(home, host, python, has_driver, step)
        facts = python_probe.ask(python)
        _describe_torch(facts, has_driver, step)
    return facts


def _check_packages(facts: Facts, steps: Steps) -> Facts:
    with steps.step("Packages of ComfyUI") as step:
        step.result = "already there"
        _describe_torch(facts, machine.nvidia() is not None, step)
    return facts


def _describe_torch(facts: Facts, has_driver: bool, step: Step) -> None:
    step.note(f"torch {facts.torch}, {facts.build}")
    if has_driver and facts.on_cpu:
        step.note(NO_GPU_USED)
