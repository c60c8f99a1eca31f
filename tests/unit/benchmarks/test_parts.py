"""A whole run of benchmarks (parts.py, all.py), with commands of a line in place of the real ones."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zimage_turbo.benchmarks import parts
from zimage_turbo.benchmarks.parts import PARTS, Conditions, Outcome, Part

WRITES = "import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text(repr(sys.argv[1:]))"
RIGHT = Part("right", ("-c", WRITES, "whole"), 60, ("-c", WRITES, "fewer"), without_gpu=("tiny",))
WRONG = Part("wrong", ("-c", WRITES + "; sys.exit(3)"), 60)
SILENT = Part("silent", ("-c", "pass"), 60)
SLOW = Part("slow", ("-c", "import time; time.sleep(600)"), 0.5)


def under(folder, **changed) -> Conditions:
    given = {"gpu": "NVIDIA H100 80GB HBM3", "weights": ["--demo"], "quick": False, "environment": dict(os.environ)}
    return Conditions(folder, **given | changed)


def test_one_that_fails_does_not_stop_the_others(tmp_path):
    outcomes = [parts.measure(part, under(tmp_path)) for part in (WRONG, SILENT, SLOW, RIGHT)]
    assert [outcome.state for outcome in outcomes] == [
        "failed: exit status 3", "failed: it left no result", "failed: longer than 0.5 s", "ok",
    ]  # fmt: skip
    assert [outcome.failed for outcome in outcomes] == [True, True, True, False]
    assert [outcome.result and outcome.result.name for outcome in outcomes] == [
        "wrong_h100.json", None, None, "right_h100.json",
    ]  # fmt: skip
    for outcome, line in zip(outcomes, parts.table(outcomes)[2:], strict=False):
        assert line.startswith(outcome.name) and line.endswith(outcome.state)


def test_an_older_result_is_not_taken_for_a_new_one(tmp_path):
    (tmp_path / "silent_h100.json").write_text("old")
    assert parts.measure(SILENT, under(tmp_path)).failed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "changed", "expected"),
    [
        (RIGHT, {}, ["whole"]),
        (RIGHT, {"quick": True}, ["fewer"]),
        (dataclasses.replace(RIGHT, needs_weights=True), {}, ["whole", "--demo"]),
        (dataclasses.replace(RIGHT, needs_gpu=False), {"gpu": ""}, ["whole", "tiny"]),
    ],
)
def test_what_a_part_is_called_with(tmp_path, part, changed, expected):
    outcome = parts.measure(part, under(tmp_path, **changed))
    assert outcome.result.read_text() == repr([*expected, "--out", str(outcome.result)])


def test_without_a_gpu_a_part_that_needs_one_is_skipped(tmp_path):
    outcome = parts.measure(WRONG, under(tmp_path, gpu=""))
    assert outcome.state.startswith("skipped") and not outcome.failed


@pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX's")
def test_nothing_that_a_part_started_outlives_its_limit(tmp_path):
    note = tmp_path / "pid"
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    code = (
        "import pathlib, subprocess, sys, time;"
        f"pathlib.Path({str(note)!r}).write_text(str(subprocess.Popen([sys.executable, '-c', {child!r}]).pid));"
        "time.sleep(600)"
    )
    assert parts.run("parent", [sys.executable, "-c", code], 3, dict(os.environ)).failed
    pid = int(note.read_text())
    for _ in range(100):
        if not _runs(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the part's child still ran")


def _runs(pid: int) -> bool:
    """A child that nobody waited for may stay as a zombie, which does nothing."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA Graphics Device", "graphicsdevice"),
        ("", "cpu"),
    ],
)
def test_name_of_a_gpu_in_files(gpu, expected):
    assert parts.suffix(gpu) == expected


def test_every_part_is_a_script_that_knows_its_options():
    assert len({part.name for part in PARTS}) == len(PARTS) and {part.name for part in PARTS} >= set(parts.PLOTTED)
    for path in {part.words[0] for part in PARTS}:
        text = Path(path).read_text(encoding="utf-8")
        used = [part for part in PARTS if part.words[0] == path]
        words = {word for part in used for word in (*part.words, *part.quick, *part.without_gpu, "--out")}
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in text, (path, option)
        for part in used:
            assert part.words[0] == part.quick[0] and part.needs_weights == ("weight_files.add_arguments" in text)


def test_plots_are_drawn_of_what_is_there(pack, tmp_path):
    nothing = [Outcome("vae", "ok", 1.0, tmp_path / "vae_h100.json"), Outcome("server", "failed: exit status 1", 1.0)]
    assert parts.draw(nothing, dict(os.environ)).state.startswith("skipped")
    pytest.importorskip("matplotlib")
    name = "endurance_h100.json"
    result = tmp_path / name
    result.write_bytes((pack / "benchmarks" / "results" / name).read_bytes())
    assert parts.draw([Outcome("endurance", "ok", 1.0, result)], dict(os.environ)).state == "ok"
    assert (tmp_path / "endurance_h100_memory.png").stat().st_size


@pytest.mark.parametrize(("more", "status"), [(["--only", "vae"], 0), (["--only", "server"], 2), (["--only", "x"], 2)])
def test_all(pack, tmp_path, more, status):
    command = [sys.executable, str(pack / "benchmarks" / "all.py"), "--out", str(tmp_path / "out"), *more]
    done = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("skipped: needs an NVIDIA GPU" in done.stdout) == (status == 0)
    assert ("needs weights" in done.stderr) == ("server" in more)
