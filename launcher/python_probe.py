"""Asks a Python about torch and packages, in a process of its own: importing torch is slow and may crash."""

import dataclasses
import json
import subprocess
from pathlib import Path

from .report import LauncherError

INSIDE = Path(__file__).parent / "inside"


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU that torch sees; memory in bytes."""

    name: str
    total: int
    free: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """What one Python has. ``torch`` is None without a usable torch; ``torch_error`` then says why, if it is there."""

    python: str
    executable: Path
    missing: tuple[str, ...]
    torch: str | None
    torch_error: str | None = None
    cuda: str | None = None
    hip: str | None = None
    devices: tuple[Device, ...] = ()
    other_accelerators: tuple[str, ...] = ()

    @property
    def on_cpu(self) -> bool:
        """Whether ComfyUI must be started with ``--cpu``."""
        return not self.devices and not self.other_accelerators

    @property
    def runs_comfyui(self) -> bool:
        return self.torch is not None and not self.missing

    @property
    def build(self) -> str:
        """Name the kind of torch build: CUDA with its version, ROCm, or CPU."""
        if self.cuda:
            return f"CUDA {self.cuda}"
        return f"ROCm {self.hip}" if self.hip else "CPU build"


def parse(line: str) -> Facts:
    """Read the line that inside/probe.py prints."""
    fields = json.loads(line)
    fields["executable"] = Path(fields["executable"])
    fields["missing"] = tuple(fields["missing"])
    fields["devices"] = tuple(Device(**device) for device in fields.get("devices", ()))
    fields["other_accelerators"] = tuple(fields.get("other_accelerators", ()))
    return Facts(**fields)


def ask(python: Path, requirements: Path | None = None) -> Facts:
    """Run inside/probe.py with ``python``; ``requirements`` names a file whose packages should be there.

    Raises LauncherError when that Python cannot be started or dies.
    """
    command = [str(python), str(INSIDE / "probe.py")]
    command += ["--requirements", str(requirements)] if requirements else []
    remedy = f"run '{python} -c \"import torch\"' to see the whole error, and repair or replace that Python"
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LauncherError(f"{python} did not answer: {error}", remedy) from error
    lines = answer.stdout.strip().splitlines()
    if answer.returncode != 0 or not lines:
        raise LauncherError(
            f"{python} died while importing torch (exit code {answer.returncode})",
            remedy,
            "\n".join(answer.stderr.splitlines()[-15:]),
        )
    return parse(lines[-1])
