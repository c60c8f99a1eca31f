"""A real ComfyUI in a base directory of its own."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from zimage_turbo.launcher.server import Server, free_port

START_SECONDS = 120
ARTIFACTS = Path(__file__).resolve().parent.parent / "artifacts"


@contextmanager
def running(tree: Path, base: Path, name: str, *options: str | Path) -> Iterator[Server]:
    """Start ComfyUI on a free port of this machine; end it on leaving.

    ``base``: folder with custom_nodes, models, input, output and user. The log is artifacts/``name``.log.
    """
    environment = {
        key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"
    }  # main.py needs its folder
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # tests, server and browser share the cores: nobody may spin
    device = [] if torch.cuda.is_available() else ["--cpu"]
    database = f"sqlite:///{base / 'comfyui.db'}"  # by default all servers of one tree share a locked file
    arguments = ["--base-directory", base, "--database-url", database, "--disable-api-nodes", *device, *options]
    log = ARTIFACTS / f"{name}.log"
    with Server(Path(sys.executable), tree, arguments, "127.0.0.1", free_port(), environment, log) as server:
        server.wait_until_ready(START_SECONDS)
        yield server
