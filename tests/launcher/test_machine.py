"""The table, and what its rows say about a machine."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zimage_turbo.launcher import check, environment, machine, models, start
from zimage_turbo.launcher.home import Home, venv_program
from zimage_turbo.launcher.machine import GIB, MIB, Gpu, Nvidia
from zimage_turbo.launcher.python_probe import Device, Facts
from zimage_turbo.launcher.report import LauncherError
from zimage_turbo.launcher.table import NOTE, OK, PROBLEM, Row, render

DRIVER = Nvidia("580.95", (Gpu("NVIDIA H100 80GB", 80 * GIB, 79 * GIB),))


def facts(**fields):
    return Facts(**{"python": "3.11.7", "executable": Path("python"), "missing": (), "torch": "2.13.0", **fields})


def test_columns_are_aligned():
    lines = render([Row(OK, "RAM", "64 GiB"), Row(PROBLEM, "ComfyUI", "too old", "update it")]).splitlines()
    assert lines == [
        "ok       RAM      64 GiB",
        "PROBLEM  ComfyUI  too old",
        "                  -> update it",
    ]


def test_nvidia_smi_lines():
    found = machine.parse_nvidia_smi("580.95, 81559, 81008, NVIDIA H100 80GB HBM3\n580.95, [N/A], [N/A], NVIDIA GB10\n")
    assert found == Nvidia("580.95", (Gpu("NVIDIA H100 80GB HBM3", 81559 * MIB, 81008 * MIB), Gpu("NVIDIA GB10", 0, 0)))
    assert machine.parse_nvidia_smi("") is None


def test_meminfo():
    assert machine.parse_meminfo("MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 60 kB\n") == (102400, 61440)


@pytest.mark.parametrize(
    ("found", "used", "nvidia", "mark"),
    [
        (facts(cuda="13.0", devices=(Device("H100", 1, 1),)), True, DRIVER, OK),
        (facts(torch="2.13.0+cpu"), True, None, OK),
        (facts(torch="2.13.0+cpu"), True, DRIVER, PROBLEM),
        (facts(cuda="13.0"), True, DRIVER, PROBLEM),
        (facts(torch=None), True, None, PROBLEM),
        (facts(torch=None), False, None, NOTE),
        (facts(torch="2.13.0+cpu"), False, DRIVER, NOTE),
        (facts(torch=None, torch_error="ImportError: broken"), True, None, PROBLEM),
    ],
)
def test_torch_row(found, used, nvidia, mark):
    row = check.judge_torch(found, used, nvidia)
    assert row.mark == mark
    assert (row.remedy != "") == (mark == PROBLEM)


def test_packages_are_mended_by_who_made_them_a_driver_is_not():
    for wrong in (facts(torch=None), facts(torch="2.13.0+cpu")):
        assert check.judge_torch(wrong, True, DRIVER, "run it again").remedy == "run it again"
    assert "install a driver for CUDA 13.0" in check.judge_torch(facts(cuda="13.0"), True, DRIVER, "again").remedy


def test_model_files_are_found_in_every_folder_comfyui_searches(tmp_path):
    (tmp_path / "models" / "unet" / "z").mkdir(parents=True)
    (tmp_path / "models" / "unet" / "z" / "z_image_turbo_bf16.safetensors").touch()
    (tmp_path / "shared" / "enc").mkdir(parents=True)
    (tmp_path / "shared" / "enc" / "qwen_3_4b.safetensors").touch()
    sections = {"mine": {"base_path": "shared", "is_default": True, "text_encoders": "enc\nmore\n"}, "empty": None}
    extra = models.folders_of(sections, tmp_path)
    transformer, encoder, vae = models.search(tmp_path / "models", extra)
    assert transformer.path.parent.name == "z"
    assert encoder.path == tmp_path / "shared" / "enc" / "qwen_3_4b.safetensors"
    assert vae.path is None and vae.folder == tmp_path / "models" / "vae"


def test_unreadable_extra_model_paths(tmp_path):
    (tmp_path / "extra_model_paths.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        models.extra_folders(tmp_path)


@pytest.mark.parametrize(
    ("current", "visible", "wanted", "expected"),
    [(None, 8, 3, "0,1,2"), ("2,3,5", 3, 2, "2,3"), ("GPU-a, GPU-b", 2, 1, "GPU-a"), (None, 1, 1, "0")],
)
def test_first_gpus_of_the_visible_ones(current, visible, wanted, expected):
    assert start.limit_gpus(current, visible, wanted) == expected


@pytest.mark.parametrize(("visible", "wanted"), [(0, 1), (2, 3), (2, 0), (2, -1)])
def test_gpus_that_are_not_there(visible, wanted):
    with pytest.raises(LauncherError, match=rf"--num_gpus {wanted}: {visible} GPU\(s\) are visible"):
        start.limit_gpus(None, visible, wanted)


def test_description_of_gpus_and_memory():
    found = facts(cuda="13.0", devices=(Device("NVIDIA H100 80GB", 80 * GIB, 70 * GIB),))
    lines = start.describe(found, {"CUDA_VISIBLE_DEVICES": "0"}, (64 * GIB, 32 * GIB))
    assert lines == [
        "GPU 0: NVIDIA H100 80GB, 70.0 GiB free of 80.0 GiB",
        "CUDA_VISIBLE_DEVICES=0",
        "RAM: 32.0 GiB available of 64.0 GiB",
    ]
    assert "ComfyUI runs on the CPU" in start.describe(facts(torch="2.13.0+cpu"), {}, None)[0]


def run_check(install):
    answer = subprocess.run([sys.executable, str(install)], capture_output=True, text=True, encoding="utf-8")
    assert answer.stderr == ""
    return answer


@pytest.fixture
def inside(tmp_path, comfyui, pack):
    """The pack's install.py inside a ComfyUI."""
    tree = tmp_path / "ComfyUI"
    (tree / "custom_nodes").mkdir(parents=True)
    for name in ("main.py", "comfyui_version.py", "requirements.txt"):
        shutil.copy(comfyui / name, tree / name)
    (tree / "custom_nodes" / "z-image-turbo").symlink_to(pack, target_is_directory=True)
    return tree / "custom_nodes" / "z-image-turbo" / "install.py"


def test_check_inside_a_comfyui(inside):
    answer = run_check(inside)
    rows = {line.split()[1]: line.split()[0] for line in answer.stdout.splitlines() if line[:1].strip()}
    assert rows["ComfyUI"] == "ok" and rows["Python"] == "ok" and rows["Disk"] in ("ok", "note")
    assert str(inside.parents[2] / "models" / "vae") in answer.stdout
    assert answer.returncode == (1 if "PROBLEM" in rows.values() else 0)


def test_comfyui_that_is_too_old(pack, tmp_path):
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.3.75"\n')
    row = check.host_row(pack, tmp_path)
    assert (row.mark, row.remedy) == (PROBLEM, "update this ComfyUI")
    assert "version 0.3.75, this pack needs >=0.30.0" in row.found


@pytest.fixture
def outside(tmp_path, pack):
    """A copy of what install.py consists of, outside of any ComfyUI."""
    copied = tmp_path / "pack"
    copied.mkdir()
    for name in ("install.py", "pyproject.toml"):
        shutil.copy(pack / name, copied / name)
    shutil.copytree(pack / "launcher", copied / "launcher")
    return copied / "install.py"


def test_check_outside_a_comfyui_says_what_to_do(outside):
    answer = run_check(outside)
    assert "does not lie in a ComfyUI's custom_nodes folder" in answer.stdout
    assert "python install.py run" in answer.stdout


def test_check_looks_at_what_was_set_up(outside, comfyui):
    home = Home.of(outside.parent, {})
    home.comfyui.mkdir(parents=True)
    for name in ("main.py", "comfyui_version.py"):
        shutil.copy(comfyui / name, home.comfyui / name)
    version = home.comfyui / "comfyui_version.py"
    python = venv_program(home.venv, "python")
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert "custom_nodes" in run_check(outside).stdout  # packages are not there yet
    environment.packages_stamp(home).write_text("{}")
    answer = run_check(outside)
    assert "custom_nodes" not in answer.stdout and f"by install.py in {home.runtime}" in answer.stdout
    assert f" in {home.comfyui} (needed: " in answer.stdout
    for content in ('__version__ = "0.3.1"', ""):
        version.write_text(content)
        answer = run_check(outside)
        assert answer.returncode == 1 and "PROBLEM  ComfyUI" in answer.stdout
        assert "-> run 'python install.py run'; if that does not help, delete" in answer.stdout
