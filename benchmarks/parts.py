"""The parts of a whole run (all.py): what each is called with, how it is run and ended, and what came of it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import plots

SCRIPTS = Path(__file__).resolve().parent
DRAWING = str(min(8, os.cpu_count() or 1))  # processes that draw the demo: one cannot fill a GPU
PATIENCE = 30  # seconds to end by itself: server.py has a server to stop
PLOTTED = ("denoise", "memory_8gib", "memory_6gib", "endurance", "server")


@dataclass(frozen=True)
class Part:
    """What Python is called with, beside the weights and --out, and the seconds that it may take.

    quick, quick_limit: the same for a run of fewer sizes and counts. without_gpu: options in place of some of these.
    """

    name: str
    words: tuple[str, ...]
    limit: float
    quick: tuple[str, ...] = ()
    quick_limit: float = 600
    without_gpu: tuple[str, ...] = ()
    needs_gpu: bool = True
    needs_weights: bool = False


@dataclass(frozen=True)
class Outcome:
    """state: "ok", or "failed" or "skipped" with the reason behind a colon."""

    name: str
    state: str
    seconds: float = 0.0
    result: Path | None = None

    @property
    def failed(self) -> bool:
        return self.state.startswith("failed")


def script(name: str, *options: str) -> tuple[str, ...]:
    return str(SCRIPTS / f"{name}.py"), *options


PARTS = (
    Part(
        "denoise",
        script("denoise", "--rivals", "--size", "1024", "512", "2048", "--batch", "1", "2", "4", "8"), 5400,
        script("denoise", "--rivals", "--size", "1024", "512", "--batch", "1"),
    ),
    Part("text_encoder", script("text_encoder"), 900, script("text_encoder", "--tokens", "64", "256")),
    Part("vae", script("vae"), 900, script("vae", "--size", "1024", "512", "--batch", "1")),
    Part("kernels_int4", script("kernels_int4"), 900, script("kernels_int4")),
    Part("kernels_fused", script("kernels_fused"), 900, script("kernels_fused")),
    Part("swiglu_linear", script("swiglu_linear"), 300, script("swiglu_linear", "--rows", "4160")),
    Part(
        "memory_8gib",
        script("memory", "--cap", "8"), 900, script("memory", "--cap", "8", "--count", "2"), needs_weights=True,
    ),
    Part(
        "memory_6gib",
        script("memory", "--cap", "6"), 900, script("memory", "--cap", "6", "--count", "2"), needs_weights=True,
    ),
    Part("endurance", script("endurance"), 1800, script("endurance", "--count", "25"), needs_weights=True),
    Part("precision", script("precision"), 3600, script("precision", "--count", "40"), needs_gpu=False),
    Part(
        "quality_solvers", script("quality", "solvers", "--processes", DRAWING), 3600,
        script("quality", "solvers", "--processes", DRAWING, "--count", "40", "--nfe", "4", "8"),
        without_gpu=("--processes", "1", "--count", "4", "--nfe", "8"), needs_gpu=False,
    ),
    Part(
        "quality_tags", script("quality", "tags", "--processes", DRAWING), 3600,
        script("quality", "tags", "--processes", DRAWING, "--count", "40"),
        without_gpu=("--processes", "1", "--count", "20"), needs_gpu=False,
    ),
    Part(
        "png", script("png"), 900, script("png", "--size", "1024", "--batch", "1", "--threads", str(os.cpu_count())),
        needs_gpu=False,
    ),
    Part(
        "server",
        script("server", "--stock-formats"), 4 * 3600,
        script("server", "--size", "1024", "512", "--batch", "1", "--count", "6", "--queue", "4",
               "--precision", "int4-fp8", "fp8"), 900,
        without_gpu=("--size", "256", "--precision", "auto"), needs_gpu=False, needs_weights=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Conditions:
    """out: the folder of results. gpu: the GPU's name, empty without one. weights: the options that name them."""

    out: Path
    gpu: str
    weights: list[str]
    quick: bool
    environment: dict[str, str]


def measure(part: Part, under: Conditions) -> Outcome:
    """Run one part, its result in the folder of results."""
    if part.needs_gpu and not under.gpu:
        return Outcome(part.name, "skipped: needs an NVIDIA GPU")
    words, limit = (part.quick, part.quick_limit) if under.quick else (part.words, part.limit)
    options = [*(() if under.gpu else part.without_gpu), *(under.weights if part.needs_weights else ())]
    result = under.out / f"{part.name}_{suffix(under.gpu)}.json"
    command = [sys.executable, *words, *options, "--out", str(result)]
    return run(part.name, command, limit, under.environment, result)


def draw(outcomes: Iterable[Outcome], environment: dict[str, str]) -> Outcome:
    """The plots of what was measured."""
    results = [str(outcome.result) for outcome in outcomes if outcome.result and outcome.name in PLOTTED]
    if not results:
        return Outcome("plots", "skipped: nothing was measured that can be drawn")
    if not plots.available():
        return Outcome("plots", "skipped: matplotlib is not installed. python -m pip install matplotlib")
    return run("plots", [sys.executable, *script("plots"), *results], 300, environment)


def suffix(gpu: str) -> str:
    """What a GPU is called in a file's name: "h100" for "NVIDIA H100 80GB HBM3", "cpu" for none."""
    words = re.split(r"[ -]", re.sub(r"NVIDIA|GeForce", "", gpu).strip())
    ends = next((index for index, word in enumerate(words) if re.search(r"\d", word)), len(words) - 1)
    return "".join(words[: ends + 1]).lower() or "cpu"


def run(
    name: str, command: list[str], limit: float, environment: dict[str, str], result: Path | None = None
) -> Outcome:
    """Run a command to its end, or end it after `limit` seconds with all that it started in its group.

    result: the file that it should leave, whatever stood there before; it may also hold what a failed part measured.
    """
    if result:
        result.unlink(missing_ok=True)
    print(f"\n== {name}, at most {limit:.0f} s", flush=True)
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=os.name != "nt")
    try:
        status = process.wait(limit)
        state = f"failed: exit status {status}" if status else "ok"
    except subprocess.TimeoutExpired:
        state = f"failed: longer than {limit:g} s"
    finally:
        end(process)
    left = result if result and result.exists() else None
    if state == "ok" and left != result:
        state = "failed: it left no result"
    return Outcome(name, state, time.monotonic() - started, left)


def end(process: subprocess.Popen) -> None:
    """Ask a process to end, wait, then kill what is left of its group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    if os.name == "nt":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError):  # the usual case: nothing is left
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def table(outcomes: list[Outcome]) -> list[str]:
    """A line for each part: its name, how many seconds it ran, its result's name and how it ended."""
    lines = [f"{'part':<15}{'seconds':>9}  {'result':<26}state"]
    for outcome in outcomes:
        result = outcome.result.name if outcome.result else ""
        lines.append(f"{outcome.name:<15}{outcome.seconds:>9.1f}  {result:<26}{outcome.state}")
    return ["", *lines, f"{sum(outcome.seconds for outcome in outcomes) / 60:.1f} minutes in all"]
