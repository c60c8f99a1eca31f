"""``start`` and ``run`` as a user calls them, on a real ComfyUI that has the pack linked in; the page in a browser."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from zimage_turbo.launcher import queueing, server
from zimage_turbo.launcher.home import DEFAULT_WORKFLOW
from zimage_turbo.launcher.report import LauncherError

START_SECONDS = 120
LOAD_SECONDS = 60_000
LOG = Path("logs") / "run.log"
BLANK = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 96, "height": 64, "batch_size": 1, "color": 0},
        "_meta": {"title": "Blank sheet"},
    },
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "blank"}},
}
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def user_tree(tmp_path_factory, comfyui):
    """A ComfyUI of a user: a copy, because the commands link the pack into it and it saves pictures."""
    tree = tmp_path_factory.mktemp("user") / "ComfyUI"
    left_out = {".git", "venv", ".venv", "models", "custom_nodes", "input", "output", "temp", "user", "tests"}
    shutil.copytree(
        comfyui, tree, ignore=lambda folder, names: left_out if Path(folder) == comfyui else {"__pycache__"}
    )
    for name in ("models", "custom_nodes", "input"):
        (tree / name).mkdir()
    return tree


@pytest.fixture(scope="module")
def environ(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return {**os.environ, "ZIMAGE_HOME": str(home), "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def editor(user_tree, environ, pack, tmp_path_factory):
    """A running ``install.py start``: its process, address and printed lines."""
    port = server.free_port()
    command = [
        sys.executable,
        pack / "install.py",
        "start",
        "--no-browser",
        "--port",
        str(port),
        "--comfyui",
        user_tree,
    ]
    output = tmp_path_factory.mktemp("start") / "output.txt"
    with open(output, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environ)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Default workflow:" not in output.read_text(encoding="utf-8"):
            assert process.poll() is None and time.monotonic() < deadline, output.read_text(encoding="utf-8")
            time.sleep(0.2)
        yield SimpleNamespace(process=process, url=f"http://127.0.0.1:{port}", text=output.read_text(encoding="utf-8"))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def test_start_says_what_it_has_and_where(editor, user_tree):
    assert "RAM: " in editor.text
    assert f"The editor is ready: {editor.url}" in editor.text
    assert f"Pictures are saved in {user_tree / 'output'}" in editor.text
    assert "To stop: press Ctrl-C" in editor.text
    assert f"{editor.url}/?template={DEFAULT_WORKFLOW}&source=z-image-turbo" in editor.text


def test_start_links_the_pack_and_places_the_workflows(editor, user_tree, pack):
    assert (user_tree / "custom_nodes" / "z-image-turbo").resolve() == pack
    placed = {path.name for path in (user_tree / "user" / "default" / "workflows").glob("*.json")}
    assert placed == {path.name for path in (pack / "workflows").glob("*.json")}


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium was not found on PATH and CHROMIUM is not set")
def test_address_opens_the_default_workflow_on_the_first_visit(editor, pack):
    from playwright.sync_api import sync_playwright

    shipped = json.loads((pack / "workflows" / f"{DEFAULT_WORKFLOW}.json").read_text(encoding="utf-8"))
    expected = sorted(node["type"] for node in shipped["nodes"])
    address = next(line.split(": ", 1)[1] for line in editor.text.splitlines() if line.startswith("Default workflow:"))
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page()
        page.route(lambda url: not url.startswith(editor.url), lambda route: route.abort())
        page.goto(address)
        page.wait_for_function("() => window.app?.vueAppReady", timeout=LOAD_SECONDS)
        page.wait_for_function(
            "types => JSON.stringify(window.app.graph.nodes.map(node => node.type).sort()) === JSON.stringify(types)",
            arg=expected,
            timeout=LOAD_SECONDS,
        )
        page.get_by_test_id("queue-button").wait_for(state="visible")
        assert page.get_by_test_id("template-workflows-content").count() == 0
        browser.close()


def run_prompt(editor, prompt):
    return queueing.run_prompt(
        SimpleNamespace(url=editor.url, check_alive=lambda when: None, log=LOG), Path(sys.executable), prompt
    )


def test_prompt_gives_its_outputs_and_its_progress(editor, capsys):
    outputs = run_prompt(editor, BLANK)
    assert outputs["2"]["images"][0]["filename"].startswith("blank")
    assert [line.split(" (")[0] for line in capsys.readouterr().out.splitlines()] == ["  Blank sheet", "  SaveImage"]


def test_real_refusal_is_readable(editor):
    wrong = {**BLANK, "1": {**BLANK["1"], "inputs": {**BLANK["1"]["inputs"], "width": 0}}}
    with pytest.raises(LauncherError, match=r"refused the workflow \(HTTP 400\)") as caught:
        run_prompt(editor, wrong)
    assert "node 1 (Blank sheet)" in caught.value.details and "width" in caught.value.details


def test_real_failure_names_the_node(editor):
    outside = {**BLANK, "2": {**BLANK["2"], "inputs": {"images": ["1", 0], "filename_prefix": "../../outside"}}}
    with pytest.raises(LauncherError, match=r"node 2 \(SaveImage\) failed: .*outside the output folder") as caught:
        run_prompt(editor, outside)
    assert str(LOG) in caught.value.remedy and not caught.value.details


def test_an_output_that_is_left_out_is_told_of(editor, capsys):
    wrong = {"class_type": "ZImageTurboSaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x" * 300}}
    outputs = run_prompt(editor, {**BLANK, "3": wrong})
    assert list(outputs) == ["2"]
    assert "Left out by ComfyUI: node 3 (ZImageTurboSaveImage): " in capsys.readouterr().out


def test_run_draws_while_the_editor_is_open(editor, user_tree, environ, pack, tmp_path):
    (tmp_path / "blank.json").write_text(json.dumps(BLANK))
    command = [sys.executable, pack / "install.py", "run", "blank.json", "--comfyui", user_tree]
    command += ["--set", "Blank sheet.width=200", "--output", "wide.png"]
    answer = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, encoding="utf-8")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f"Picture: {tmp_path / 'wide.png'} (200x64, " in answer.stdout
    assert "python install.py start" in answer.stdout
    assert list((Path(environ["ZIMAGE_HOME"]) / "logs").glob("run-*.log")) == []


def test_interrupt_stops_the_editor_and_its_server(editor):
    """Last in this file: the others need the editor."""
    editor.process.send_signal(signal.SIGINT)
    assert editor.process.wait(30) == 0
    with pytest.raises(OSError):
        server.fetch(f"{editor.url}/system_stats", timeout=5)
