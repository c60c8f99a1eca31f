"""``install.py run``: draw one workflow, from nothing to a picture in the current folder."""

import os
import tempfile
import time
from pathlib import Path

from . import convert, pictures, preparation, queueing, server, workflow
from .home import Home
from .report import LauncherError, Steps
from .workflow import Change


def run(home: Home, file: Path | None, comfyui: str | None, settings: list[str], output: Path | None) -> None:
    """Set up what is missing, run the workflow on a server of its own and save its pictures.

    Raises LauncherError for anything the user has to act on; what was started is stopped in every case.
    """
    changes = [Change.parse(text) for text in settings]
    if output is not None and not output.absolute().parent.is_dir():
        raise LauncherError(f"--output {output}: the folder does not exist", "make it first, or choose another file")
    path = file or home.default_workflow
    graph = workflow.read(path)
    if workflow.is_api_format(graph):
        for change in changes:  # before minutes of set-up, not after
            workflow.find_node(graph, change.target)

    steps = Steps(preparation.STEPS + 2)
    installation = preparation.prepare(home, comfyui, steps)
    with (
        tempfile.TemporaryDirectory(prefix="zimage-") as scratch,
        _server(home, installation, Path(scratch), steps) as comfy,
    ):
        steps.heading(f"Running {path.name}")
        started = time.monotonic()
        object_info = server.fetch_json(f"{comfy.url}/object_info")
        prompt = convert.to_api(graph, object_info) if workflow.is_editor_format(graph) else graph
        prompt = workflow.apply(prompt, changes, object_info)
        outputs = queueing.run_prompt(comfy, installation.python, prompt)
        images = pictures.listed(outputs)
        paths = pictures.targets(images, output, Path.cwd())
        pictures.save(comfy.url, images, paths)
        seconds = time.monotonic() - started
    comfy.log.unlink()  # of use only when something fails
    for text in pictures.texts(outputs):
        print(text)
    for saved in paths:
        print(f"Picture: {saved.absolute()} ({pictures.size_text(saved)})")
    if not paths:
        print("The workflow ran and saved no picture (no Save Image or Preview Image node in it).")
    print(f"The workflow took {seconds:.1f} s.")
    print("To draw in the graph editor: python install.py start")


def _server(home: Home, installation: preparation.Installation, scratch: Path, steps: Steps) -> server.Server:
    """Start a server and return it when it answers."""
    arguments = [
        *installation.server_arguments,
        # An editor may be running on the same folders: its database is locked, and its previews must stay.
        *("--database-url", "sqlite:///:memory:", "--temp-directory", scratch),
    ]
    port = server.free_port()
    log = home.logs / f"run-{port}.log"
    with steps.step("Starting ComfyUI") as step:
        tree = installation.host.tree
        comfy = server.Server(installation.python, tree, arguments, "127.0.0.1", port, dict(os.environ), log)
        try:
            comfy.wait_until_ready()
        except BaseException:
            comfy.stop()
            raise
        step.note(comfy.url)
    return comfy
