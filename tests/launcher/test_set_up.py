"""Stamps, tools that fail, the environment and the archive of ComfyUI: without a network."""

import io
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import pytest

from zimage_turbo.launcher import comfyui, environment, lock, stamp
from zimage_turbo.launcher.comfyui import Host
from zimage_turbo.launcher.home import Home, venv_program
from zimage_turbo.launcher.inside import cpu_extras, probe
from zimage_turbo.launcher.report import LauncherError, Steps
from zimage_turbo.launcher.tool import run_tool


@pytest.fixture
def home(tmp_path, pack):
    return Home.of(pack, {"ZIMAGE_HOME": str(tmp_path / "runtime")})


@pytest.fixture
def step():
    return SimpleNamespace(result="done", note=lambda text: None, live=lambda text: None)


@pytest.fixture
def host(tmp_path):
    tree = tmp_path / "ComfyUI"
    tree.mkdir()
    (tree / "main.py").touch()
    (tree / "comfyui_version.py").write_text('__version__ = "0.30.0"\n')
    (tree / "requirements.txt").write_text("torch\naiohttp>=3\n")
    return Host(tree, owned=True)


def test_stamp_is_current_only_for_the_same_record(tmp_path):
    mark = tmp_path / "deep" / "stamp.json"
    assert not stamp.is_current(mark, {"pins": ["a"]})
    stamp.write(mark, {"pins": ["a"]})
    assert stamp.is_current(mark, {"pins": ["a"]})
    assert not stamp.is_current(mark, {"pins": ["b"]})
    mark.write_text('{"pins": [')
    assert not stamp.is_current(mark, {"pins": ["a"]})
    stamp.clear(mark)
    assert not mark.exists()


def test_packages_are_installed_once(home, host, step, monkeypatch):
    calls = []
    monkeypatch.setattr(environment, "run_tool", lambda command, *rest, **more: calls.append(command))
    home.venv.mkdir(parents=True)
    environment.install_packages(home, host, home.venv / "python", False, step)
    pip, extras = calls
    assert {"torch==2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0", "-r", host.requirements} <= set(pip)
    assert extras[1].name == "cpu_extras.py"

    environment.install_packages(home, host, home.venv / "python", False, step)
    assert len(calls) == 2 and step.result == "already there"

    host.requirements.write_text("torch\naiohttp>=4\n")
    environment.install_packages(home, host, home.venv / "python", False, step)
    assert len(calls) == 4


def test_interrupted_installation_is_repeated_in_a_new_environment(home, host, step, monkeypatch):
    def broken(command, *rest, **more):
        raise KeyboardInterrupt

    python = venv_program(home.venv, "python")
    python.parent.mkdir(parents=True)
    python.touch()
    stamp.write(environment.packages_stamp(home), {"pins": ["old"]})
    monkeypatch.setattr(environment, "run_tool", broken)
    with pytest.raises(KeyboardInterrupt):
        environment.install_packages(home, host, python, False, step)

    calls = []
    monkeypatch.setattr(environment, "run_tool", lambda command, *rest, **more: calls.append(command))
    environment.create(home, step)
    assert [str(word) for word in calls[0][1:4]] == ["-m", "venv", "--clear"]


def test_finished_environment_is_kept(home, step, monkeypatch):
    monkeypatch.setattr(environment, "run_tool", lambda *words, **more: pytest.fail("nothing is to be run"))
    python = venv_program(home.venv, "python")
    python.parent.mkdir(parents=True)
    python.touch()
    stamp.write(environment.packages_stamp(home), {})
    assert environment.create(home, step) == python
    assert step.result == "already there"


def test_cpu_build_is_excluded_only_with_a_driver():
    assert environment.torch_pins(False)[0] == "torch==2.13.0"
    assert environment.torch_pins(True)[0] == "torch==2.13.0,!=2.13.0+cpu"


def test_failing_tool_gives_its_last_lines_and_the_remedy(tmp_path):
    code = "print('\\n'.join(f'line {n}' for n in range(40))); raise SystemExit(3)"
    with pytest.raises(LauncherError) as caught:
        run_tool([sys.executable, "-c", code], tmp_path / "logs" / "tool.log", "it did not work", "try this")
    text = caught.value.render()
    assert "Problem: it did not work (exit code 3" in text
    assert "| line 39" in text and "| line 25" in text and "line 24" not in text
    assert text.endswith("What to do: try this")
    assert "line 0\n" in (tmp_path / "logs" / "tool.log").read_text()


def test_missing_tool_is_an_error_with_the_same_remedy(tmp_path):
    with pytest.raises(LauncherError, match="no-such-program could not be started") as caught:
        run_tool(["no-such-program"], tmp_path / "tool.log", "it did not work", "try this")
    assert caught.value.remedy == "try this"


def test_failed_step_says_so_on_its_line():
    stream = io.StringIO()
    steps = Steps(2, stream)
    with steps.step("First") as step:
        step.result = "already there"
        step.note("detail")
    with pytest.raises(LauncherError), steps.step("Second"):
        raise LauncherError("broken", "repair it")
    first, detail, second = stream.getvalue().splitlines()
    assert first.startswith("[1/2] First … already there (") and detail == "      detail"
    assert second.startswith("[2/2] Second … failed (")


def test_failed_download_leaves_no_tree(home, step, monkeypatch):
    def offline(*words, **more):
        raise LauncherError("no network", "connect")

    monkeypatch.setattr(comfyui, "run_tool", offline)
    with pytest.raises(LauncherError, match="no network"):
        comfyui.fetch(home, home.venv / "python", step)
    assert not home.comfyui.exists() and list(home.runtime.iterdir()) == []


def archive_of(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_fetched_tree_replaces_an_older_one_and_is_kept_then(home, step, monkeypatch):
    def download(command, *rest, **more):
        folder = command[command.index("-d") + 1]
        tree = comfyui.SOURCE_TREE
        archive_of(
            folder / "source.tar.gz", {f"{tree}main.py": b"", f"{tree}comfyui_version.py": b"__version__='0.30.0'"}
        )

    monkeypatch.setattr(comfyui, "run_tool", download)
    home.comfyui.mkdir(parents=True)
    (home.comfyui / "old.py").touch()
    comfyui.fetch(home, home.venv / "python", step)
    assert comfyui.version(home.comfyui) == "0.30.0" and not (home.comfyui / "old.py").exists()

    monkeypatch.setattr(comfyui, "run_tool", lambda *words, **more: pytest.fail("nothing is to be downloaded"))
    comfyui.fetch(home, home.venv / "python", step)
    assert step.result == "already there"


def test_archive_paths_stay_inside(tmp_path):
    archive = archive_of(tmp_path / "a.tar.gz", {"x/main.py": b"", "x/../../outside.py": b""})
    with pytest.raises(LauncherError, match="path outside itself"):
        comfyui.extract(archive, "x/", tmp_path / "target")
    assert not (tmp_path / "outside.py").exists()


def test_version_that_the_pack_cannot_use_is_refused(pack, host):
    assert comfyui.check_version(pack, host.tree) == "0.30.0"
    (host.tree / "comfyui_version.py").write_text('__version__ = "0.3.75"\n')
    with pytest.raises(LauncherError, match=r"version 0\.3\.75, this pack needs >=0\.30\.0"):
        comfyui.check_version(pack, host.tree)


def test_choice_of_comfyui(tmp_path, home, host):
    assert comfyui.choose(home, str(host.tree)) == Host(host.tree, owned=False)
    assert comfyui.choose(Home(tmp_path / "pack", home.runtime), None) == Host(home.comfyui, owned=True)
    inside = Home(host.tree / "custom_nodes" / "z-image-turbo", home.runtime)
    assert comfyui.choose(inside, None) == Host(host.tree, owned=False)
    with pytest.raises(LauncherError, match="is not a ComfyUI folder"):
        comfyui.choose(home, str(tmp_path))


def test_lock_is_exclusive_and_ends_with_its_holder(tmp_path, pack):
    path = tmp_path / "setup.lock"
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from launcher.lock import exclusive\n"
        "with exclusive(Path(sys.argv[2])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, pack, path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with open(path, "ab") as file, pytest.raises(OSError):
            lock._try_lock(file)
    finally:
        holder.kill()
        holder.wait()
    with lock.exclusive(path):
        pass


def test_cpu_extras_edits_once(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchaudio" / "lib").mkdir(parents=True)
    for name in ("torchvision/_C.so", "torchvision/image.so", "torchaudio/lib/_torchaudio.abi3.so"):
        (tmp_path / name).touch()
    extension = tmp_path / "torchvision" / "extension.py"
    extension.write_text("def _has_ops():\n    return False\n")
    assert cpu_extras.remove_libraries(tmp_path) == 3
    cpu_extras.define_schemas(tmp_path)
    edited = extension.read_text()
    compile(edited, "extension.py", "exec")
    assert cpu_extras.remove_libraries(tmp_path) == 0
    cpu_extras.define_schemas(tmp_path)
    assert extension.read_text() == edited and edited.count(cpu_extras.MARKER) == 1


def test_probe_lists_missing_packages():
    text = "pytest\n# comment\n\nno-such-package-of-ours>=1\nonly-elsewhere; sys_platform == 'nowhere'\n"
    assert probe.missing_distributions(text) == ["no-such-package-of-ours"]
