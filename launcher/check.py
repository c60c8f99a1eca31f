"""``install.py`` without a command: looks at the machine and at the ComfyUI around the pack, or the one it set up.

It installs nothing and uses no network. A PROBLEM row means the pack cannot work as things are; a note is only worth
knowing (without model files, for instance, the demo checkpoint still draws).
"""

import platform
import sys
from pathlib import Path

from . import comfyui, environment, machine, models, pyproject, python_probe
from .home import Home, venv_program
from .machine import GIB, Nvidia
from .python_probe import Facts
from .report import LauncherError
from .table import NOTE, OK, PROBLEM, Row, render

LOW_RAM = 16 * GIB
LOW_DISK = 10 * GIB


def check(home: Home) -> int:
    """Print the table and return the exit code: 1 if a row is a PROBLEM, else 0."""
    tree = comfyui.around(home.pack)
    nvidia = machine.nvidia()
    if tree is None and environment.is_finished(home):
        programs = own_rows(home, nvidia)
    else:
        programs = [
            torch_row(Path(sys.executable), tree is not None, nvidia),
            host_row(home.pack, tree),
            packages_row(home.pack, tree),
        ]
    rows = [
        Row(OK, "Python", f"{platform.python_version()} ({sys.executable})"),
        *programs,
        *gpu_rows(nvidia),
        *memory_rows(machine.memory()),
        disk_row(home.pack, machine.free_disk(home.pack)),
        *model_rows(home, tree),
    ]
    print(render(rows))
    problems = [row for row in rows if row.mark == PROBLEM]
    print()
    print(f"{len(problems)} problem(s) to solve." if problems else "No problems.")
    return 1 if problems else 0


def torch_row(python: Path, used: bool, nvidia: Nvidia | None, mend: str = "") -> Row:
    try:
        facts = python_probe.ask(python)
    except LauncherError as error:
        return Row(PROBLEM, "torch", error.reason, mend or error.remedy)
    return judge_torch(facts, used, nvidia, mend)


def judge_torch(facts: Facts, used: bool, nvidia: Nvidia | None, mend: str = "") -> Row:
    """Make the torch row. used: by a ComfyUI; else a finding is only a note: the set-up brings a torch of its own.
    mend: what helps where the wrong packages are there, if not what helps a Python of the user's."""
    found = f"{facts.torch}, {facts.build}"
    if facts.torch is None:
        found = facts.torch_error or "not installed in this Python"
        remedy = mend or "install ComfyUI's requirements with this Python, or use ComfyUI's Python"
    elif nvidia is not None and facts.cuda is None and facts.hip is None:
        found += ", but this machine has an NVIDIA driver"
        remedy = mend or "install a CUDA build of torch (see PyTorch's installation page)"
    elif nvidia is not None and not facts.devices:
        found += f", but it sees no GPU (driver {nvidia.driver})"
        remedy = f"install a driver for CUDA {facts.cuda}, or check CUDA_VISIBLE_DEVICES"
    else:
        return Row(OK, "torch", found)
    return Row(PROBLEM, "torch", found, remedy) if used else Row(NOTE, "torch", found)


def host_row(pack: Path, tree: Path | None, mend: str = "update this ComfyUI") -> Row:
    if tree is None:
        return Row(
            NOTE,
            "ComfyUI",
            "this pack does not lie in a ComfyUI's custom_nodes folder",
            "run 'python install.py run': it sets up a ComfyUI of its own; or move the pack to ComfyUI/custom_nodes/",
        )
    try:
        found = comfyui.check_version(pack, tree)
    except LauncherError as error:
        return Row(PROBLEM, "ComfyUI", error.reason, mend)
    return Row(OK, "ComfyUI", f"{found} in {tree} (needed: {comfyui.required(pack)})")


def own_rows(home: Home, nvidia: Nvidia | None) -> list[Row]:
    """Of what ``install.py run`` or ``start`` set up; they mend what does not fit any more."""
    mend = f"run 'python install.py run'; if that does not help, delete {home.runtime} except for base/models before"
    return [
        torch_row(venv_program(home.venv, "python"), True, nvidia, mend),
        host_row(home.pack, home.comfyui, mend),
        Row(OK, "Set up", f"by install.py in {home.runtime}"),
    ]


def packages_row(pack: Path, tree: Path | None) -> Row:
    problems = environment.pack_problems(pack)
    if not problems:
        return Row(OK, "Packages", "all dependencies of this pack are installed")
    if tree is None:
        return Row(NOTE, "Packages", "; ".join(problems))
    wanted = pyproject.read(pack / "pyproject.toml", "project", "dependencies")
    quoted = " ".join(f'"{line}"' for line in wanted)
    return Row(PROBLEM, "Packages", "; ".join(problems), f"{sys.executable} -m pip install {quoted}")


def gpu_rows(nvidia: Nvidia | None) -> list[Row]:
    if nvidia is None:
        return [Row(NOTE, "GPU", "no NVIDIA driver: ComfyUI runs on the CPU", "the demo checkpoint draws there")]
    driver = Row(OK, "Driver", f"NVIDIA {nvidia.driver}")
    return [driver] + [
        Row(OK, f"GPU {index}", f"{gpu.name}, {machine.gib(gpu.free)} free of {machine.gib(gpu.total)}")
        for index, gpu in enumerate(nvidia.gpus)
    ]


def memory_rows(memory: tuple[int, int] | None) -> list[Row]:
    if memory is None:
        return [Row(NOTE, "RAM", "this operating system does not tell it to Python alone")]
    total, available = memory
    found = f"{machine.gib(available)} available of {machine.gib(total)}"
    if total < LOW_RAM:
        return [Row(NOTE, "RAM", found, "below 16 GiB loading the full bf16 files is slow: they are 20 GB together")]
    return [Row(OK, "RAM", found)]


def disk_row(folder: Path, free: int) -> Row:
    found = f"{machine.gib(free)} free at {folder}"
    if free < LOW_DISK:
        return Row(NOTE, "Disk", found, "the set-up takes 3 to 8 GB, the model files 20 GB")
    return Row(OK, "Disk", found)


def model_rows(home: Home, tree: Path | None) -> list[Row]:
    """One row a model file; a note says where a missing one belongs."""
    rows = []
    extra = {}
    if tree is not None:
        try:
            extra = models.extra_folders(tree)
        except ImportError:
            rows.append(Row(NOTE, "Models", "extra_model_paths.yaml was not read: PyYAML is missing in this Python"))
        except ValueError as error:
            rows.append(Row(NOTE, "Models", f"extra_model_paths.yaml was not read: {error}", "correct the file"))
    for file in models.search((tree or home.base) / "models", extra):
        if file.path is None:
            found = f"{file.name} not found (the demo checkpoint works without)"
            rows.append(Row(NOTE, file.part, found, f"put it into {file.folder}"))
        else:
            rows.append(Row(OK, file.part, f"{file.path} ({file.path.stat().st_size / 1e9:.1f} GB)"))
    return rows
