"""How long a new user waits: `install.py run` in a fresh copy with an empty pip cache, and the second call.

Run: python benchmarks/first_run.py [PYTHON …] [--out benchmarks/results/first_run.json]
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
VERSIONS = "import platform, torch; print(platform.python_version(), torch.__version__)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pythons", nargs="*", default=[sys.executable], help="Pythons to run install.py with")
    parser.add_argument("--out", type=Path, default=PACK / "benchmarks" / "results" / "first_run.json")
    arguments = parser.parse_args()
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}, no GPU asked for",
        "commit": _git("rev-parse", "--short", "HEAD"),
        "runs": [measure(python) for python in arguments.pythons],
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(python: str) -> dict:
    """Seconds of the first and the second call; raises CalledProcessError when one fails."""
    with tempfile.TemporaryDirectory(prefix="first-run-") as folder:
        copy = Path(folder) / "pack"
        subprocess.run(["git", "clone", "--quiet", str(PACK), str(copy)], check=True)
        environ = {**os.environ, "PIP_CACHE_DIR": str(Path(folder) / "pip")}
        seconds = []
        for number in (1, 2):
            picture = Path(folder) / f"{number}.png"
            started = time.monotonic()
            subprocess.run([python, "install.py", "run", "--output", picture], cwd=copy, env=environ, check=True)
            seconds.append(round(time.monotonic() - started, 1))
        made = next((copy / ".runtime").glob("venv-*/bin/python"))
        versions = subprocess.run([made, "-c", VERSIONS], check=True, capture_output=True, text=True).stdout.split()
        run = {"python": versions[0], "torch": versions[1], "first_s": seconds[0], "second_s": seconds[1]}
        run["disk_gb"] = round(sum(file.lstat().st_size for file in (copy / ".runtime").rglob("*")) / 1e9, 1)
        print(json.dumps(run), flush=True)
        shutil.rmtree(copy / ".runtime")
    return run


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=PACK, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
