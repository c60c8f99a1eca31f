"""Which weight files a benchmark draws with: the user's, random ones of full size, or the built-in demo."""

import argparse
import subprocess
import sys
from pathlib import Path

from ..launcher import models
from .contestants import FILES

MAKER = Path(__file__).resolve().parent / "server_weights.py"


def add_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--models", type=Path, metavar="FOLDER", help="a models folder with the three official files")
    source.add_argument(
        "--random-weights", type=Path, metavar="FOLDER", help="full-size random files, made there once (20 GB)"
    )
    source.add_argument("--demo", action="store_true", help="the built-in demo, for a machine without weights")


def words(arguments: argparse.Namespace) -> list[str]:
    """The same choice for another benchmark's command line."""
    if arguments.demo:
        return ["--demo"]
    if arguments.models:
        return ["--models", str(arguments.models)]
    return ["--random-weights", str(arguments.random_weights)]


def kind(arguments: argparse.Namespace) -> str:
    return "demo" if arguments.demo else "random, full size" if arguments.random_weights else "official"


def folder(arguments: argparse.Namespace, work: Path) -> Path:
    """The models folder, whose files are made first where that is asked for; the demo's go below `work`."""
    if arguments.models:
        return arguments.models.resolve()
    made = work / "models" if arguments.demo else arguments.random_weights.resolve()
    command = [sys.executable, str(MAKER), str(made)]
    subprocess.run([*command, "--demo"] if arguments.demo else command, check=True)
    return made


def names(folder: Path) -> dict[str, str]:
    """What ComfyUI calls the official files of a models folder, by FILES. Exits when one is missing."""
    found = models.search(folder, {})
    if missing := [str(file.folder / file.name) for file in found if file.path is None]:
        sys.exit(f"Missing: {', '.join(missing)}. Put the official files there, or use --random-weights or --demo.")
    return {kind: str(Path(*file.path.relative_to(folder).parts[1:])) for kind, file in zip(FILES, found, strict=True)}
