"""ComfyUI's own execution tests, on a copy of its tree that has the pack installed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from zimage_turbo.launcher.server import free_port

TIME_LIMIT_S = 900


def test_the_hosts_execution_tests_pass_with_the_pack(comfyui, pack, tmp_path):
    tree = tmp_path / "ComfyUI"
    own = {"models", "output", "user", "custom_nodes", ".git"}  # what a user keeps in a tree
    shutil.copytree(comfyui, tree, ignore=lambda folder, _: own if Path(folder) == comfyui else set())
    (tree / "custom_nodes").mkdir()
    (tree / "custom_nodes" / "z-image-turbo").symlink_to(pack, target_is_directory=True)
    # The tests start a literal "python main.py": this interpreter has to be the first of that name.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/execution", "-q", "--skip-timing-checks", "--port", str(free_port())],
        cwd=tree, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S)  # fmt: skip
    end = done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", end)
    assert done.returncode == 0, end + done.stderr[-2000:]
    assert passed and int(passed[1]) > 200, end
