"""Under what a figure was measured."""

import shutil
import subprocess

import pytest

from zimage_turbo.benchmarks import conditions

GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")


def git(folder, *words: str) -> str:
    return subprocess.run([*GIT, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_the_pack_s_own(tmp_path, monkeypatch):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    monkeypatch.setattr(conditions, "PACK", tmp_path)
    head = git(tmp_path, "rev-parse", "HEAD")
    assert head.startswith(conditions.commit()["commit"])
    (tmp_path / "file").write_text("two")
    assert conditions.commit()["commit"].endswith("-dirty")

    copy = tmp_path / "copy"  # without a .git of its own, in the checkout of others
    copy.mkdir()
    monkeypatch.setattr(conditions, "PACK", copy)
    assert conditions.commit() == {}


def test_every_result_says_the_commit():
    stated = conditions.conditions()
    assert stated.items() >= conditions.commit().items()
    assert {"date", "device", "driver", "torch", "comfyui"} <= set(stated)
