"""The process side of the launcher, with a stand-in for ComfyUI's main.py that starts in a moment."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zimage_turbo.launcher import chromium, selftest, server
from zimage_turbo.launcher.report import LauncherError
from zimage_turbo.launcher.server import Server

ANSWERS = """
import argparse, http.server, json, os, subprocess, sys
parser = argparse.ArgumentParser()
parser.add_argument("--listen"); parser.add_argument("--port", type=int)
options, rest = parser.parse_known_args()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        facts = {"child": child.pid, "rest": rest, "safe": os.environ.get("PYTHONSAFEPATH")}
        self.wfile.write(json.dumps(facts).encode())
    def log_message(self, *words): pass
http.server.HTTPServer((options.listen, options.port), Handler).serve_forever()
"""
DIES = "print('loading'); raise SystemExit('no such thing as a torch')"


@pytest.fixture
def started(tmp_path):
    """A function that starts a main.py of the given text; what it started is stopped at the end."""
    servers = []

    def start(code):
        (tmp_path / "main.py").write_text(code)
        environ = {**os.environ, "PYTHONSAFEPATH": "1"}
        arguments = (Path(sys.executable), tmp_path, ["--cpu"], "127.0.0.1", server.free_port(), environ)
        servers.append(Server(*arguments, tmp_path / "logs" / "server.log"))
        return servers[-1]

    yield start
    for each in servers:
        each.stop()


def is_running(pid):
    """Whether ``pid`` runs; a zombie, which waits for nobody but its parent, does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_stop_ends_the_server_and_what_it_started(started):
    comfy = started(ANSWERS)
    comfy.wait_until_ready(30)
    facts = server.fetch_json(comfy.url)
    assert facts["rest"] == ["--disable-auto-launch", "--disable-cuda-malloc", "--cpu"] and facts["safe"] is None
    assert is_running(comfy.process.pid) and is_running(facts["child"])
    comfy.stop()
    deadline = time.monotonic() + 5
    while is_running(facts["child"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(comfy.process.pid) and not is_running(facts["child"])
    comfy.stop()  # a second stop has nothing to do


def test_proxy_of_the_environment_is_not_used(started, pack):
    comfy = started(ANSWERS)
    comfy.wait_until_ready(30)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from launcher import server; server.fetch(sys.argv[2])"
    environ = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    answer = subprocess.run([sys.executable, "-c", code, pack, comfy.url], env=environ, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_server_that_dies_shows_the_end_of_its_log(started):
    comfy = started(DIES)
    with pytest.raises(LauncherError, match=r"ComfyUI ended during its start \(exit code 1\)") as caught:
        comfy.wait_until_ready(30)
    assert "| no such thing as a torch" in caught.value.render()
    assert "server.log" in caught.value.remedy


def test_server_that_does_not_answer_in_time(started):
    comfy = started("import time; time.sleep(600)")
    with pytest.raises(LauncherError, match=r"did not answer at http://127\.0\.0\.1:"):
        comfy.wait_until_ready(0.3)


def test_taken_port_is_reported_with_a_free_one():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LauncherError, match=f"port {port} is already used") as caught:
            server.check_port("127.0.0.1", port)
    proposed = int(caught.value.remedy.rsplit("--port ", 1)[1])
    assert proposed != port
    server.check_port("127.0.0.1", proposed)
    server.check_port("127.0.0.1", port)


@pytest.mark.parametrize(("listen", "port"), [("203.0.113.7", 8188), ("no address", 8188), ("127.0.0.1", 70000)])
def test_address_that_is_not_ours(listen, port):
    with pytest.raises(LauncherError, match="is not an address of this machine"):
        server.check_port(listen, port)


@pytest.mark.parametrize(
    ("listen", "address"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("192.168.0.5", "192.168.0.5")],
)
def test_address_for_the_browser(listen, address):
    assert server.reachable(listen) == address


def test_tests_run_all_unless_named():
    assert selftest.with_place(["-k", "port"]) == ["tests", "-k", "port"]
    assert selftest.with_place(["tests/launcher", "-x"]) == ["tests/launcher", "-x"]


def test_chromium_of_the_environment_comes_first():
    assert chromium.find({"CHROMIUM": sys.executable}) == sys.executable
    with pytest.raises(LauncherError, match="CHROMIUM=/nowhere/chromium is not a program"):
        chromium.find({"CHROMIUM": "/nowhere/chromium"})


@pytest.mark.parametrize(
    ("text", "debian"),
    [('NAME="Debian"\nID=debian\n', True), ("ID=ubuntu\nID_LIKE=debian\n", False)],
)
def test_only_debian_has_a_chromium_package(text, debian):
    assert chromium.is_debian(text) is debian
