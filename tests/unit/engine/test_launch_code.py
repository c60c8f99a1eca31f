"""The C that Triton launches kernels with, on a stand-in made as Triton 3.6 is: it compiles, keeps, loads, launches."""

import importlib
import sys
from types import SimpleNamespace

import pytest

from zimage_turbo.engine import launch_code

KERNEL = SimpleNamespace(src="signature", metadata=SimpleNamespace(scratch=4))
TRITON = """
kept, compiled, loaded = {}, [], []
def _load_module_from_path(name, path):
    loaded.append(path)
    return path.upper()
def compile_module_from_src(src, name="launcher", *, directories=None):
    if src not in kept:
        compiled.append(src)
        kept[src] = directories[0] + src
    return _load_module_from_path(name, kept[src])
"""
DRIVER = """
from build import compile_module_from_src
class Launcher:
    def __init__(self, src, metadata):
        self.launch = compile_module_from_src(f"{src} {metadata.scratch}", directories=["include/"])
"""


@pytest.fixture
def triton(tmp_path, monkeypatch):
    """The stand-in's modules."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in {"build": TRITON, "driver": DRIVER}.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    build, driver = importlib.import_module("build"), importlib.import_module("driver")
    runtime = SimpleNamespace(driver=SimpleNamespace(active=SimpleNamespace(launcher_cls=driver.Launcher)))
    modules = {"triton.runtime": runtime}
    monkeypatch.setattr(launch_code, "importlib", SimpleNamespace(import_module=modules.__getitem__))
    yield SimpleNamespace(build=build, driver=driver)
    for name in ("build", "driver"):
        monkeypatch.delitem(sys.modules, name)


def test_it_is_compiled_and_not_loaded(triton):
    for _ in range(2):
        launch_code.compile_ahead(KERNEL)
    assert triton.build.compiled == ["signature 4"] and not triton.build.loaded
    launcher = triton.driver.Launcher(KERNEL.src, KERNEL.metadata)
    assert launcher.launch == "INCLUDE/SIGNATURE 4" and triton.build.loaded == ["include/signature 4"]
    assert triton.build.compiled == ["signature 4"]


def test_errors_of_the_compiler_come_up(triton):
    def refuse(*given, **named):
        raise FileNotFoundError("gcc")

    triton.build.compiled = SimpleNamespace(append=refuse)
    with pytest.raises(FileNotFoundError, match="gcc"):
        launch_code.compile_ahead(KERNEL)


@pytest.mark.parametrize("absent", ["build._load_module_from_path", "driver.compile_module_from_src"])
def test_a_triton_that_is_made_otherwise_is_left_alone(triton, absent):
    module, name = absent.split(".")
    delattr(getattr(triton, module), name)
    launch_code.compile_ahead(KERNEL)
    assert not triton.build.compiled
