"""Makes ComfyUI see the pack where it stands: a link in a custom_nodes folder."""

import os
import subprocess
from pathlib import Path

from .home import PACK_NAME
from .report import LauncherError


def existing(custom_nodes: Path, pack: Path) -> str | None:
    """Return the name under which ``custom_nodes`` already shows ``pack``, or None."""
    if not custom_nodes.is_dir():
        return None
    for entry in sorted(custom_nodes.iterdir()):
        if entry.is_dir() and entry.resolve() == pack.resolve():
            return entry.name
    return None


def ensure(custom_nodes: Path, pack: Path) -> tuple[str, bool]:
    """Return (the pack's folder name in ``custom_nodes``, whether it was linked just now).

    A dead link of that name is replaced. Raises LauncherError when something else already has the name.
    """
    name = existing(custom_nodes, pack)
    if name is not None:
        return name, False
    link = custom_nodes / PACK_NAME
    if link.exists():
        raise LauncherError(
            f"{link} exists and is not this pack ({pack.resolve()})",
            f"remove or rename {link}, or run install.py of the copy that lies there",
        )
    if _is_link(link):
        remove(link)
    custom_nodes.mkdir(parents=True, exist_ok=True)
    make(link, pack.resolve())
    return PACK_NAME, True


def make(link: Path, target: Path) -> None:
    """Link a folder. Windows gets a junction, because a symbolic link needs special rights there."""
    if os.name != "nt":
        link.symlink_to(target, target_is_directory=True)
        return
    answer = subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], capture_output=True, text=True)
    if answer.returncode != 0:
        raise LauncherError(
            f"{link} could not be linked to {target}: {answer.stderr.strip()}",
            f"copy the pack's folder to {link}",
        )


def remove(link: Path) -> None:
    """Remove a link and leave what it points to. A junction is removed like an empty folder."""
    if os.name == "nt":
        link.rmdir()
    else:
        link.unlink()


def _is_link(path: Path) -> bool:
    return os.path.lexists(path)
