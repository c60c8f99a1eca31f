import importlib.util

import pytest

from zimage_turbo.launcher import pyproject

KEYS = [
    ("project", "name"),
    ("project", "requires-python"),
    ("project", "dependencies"),
    ("project.optional-dependencies", "test"),
    ("tool.comfy", "requires-comfyui"),
]


@pytest.mark.skipif(importlib.util.find_spec("tomllib") is None, reason="tomllib came with Python 3.11")
@pytest.mark.parametrize(("table", "key"), KEYS)
def test_reads_our_own_file_as_tomllib_does(pack, table, key):
    import tomllib

    expected = tomllib.loads((pack / "pyproject.toml").read_text(encoding="utf-8"))
    for name in table.split("."):
        expected = expected[name]
    assert pyproject.read(pack / "pyproject.toml", table, key) == expected[key]


def test_says_what_is_missing(pack):
    with pytest.raises(KeyError, match=r"no \[tool.comfy\] nothing"):
        pyproject.read(pack / "pyproject.toml", "tool.comfy", "nothing")
