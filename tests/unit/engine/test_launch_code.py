"""The C that Triton launches kernels with, on a stand-in made as Triton 3.6 is: it compiles, keeps, loads, launches."""

from types import SimpleNamespace

import pytest

from zimage_turbo.engine import launch_code

KERNEL = SimpleNamespace(src="signature", metadata=SimpleNamespace(scratch=4))
BUILD = """
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
class Launcher:
    def __init__(self, src, metadata):
        self.launch = compile_module_from_src(f"{src} {metadata.scratch}", directories=["include/"])
"""
WITHOUT_C = """
class Launcher:
    def __init__(self, src, metadata):
        self.launch = f"{src} {metadata.scratch}"
"""


@pytest.fixture
def triton(monkeypatch):
    """Makes the stand-in of its two modules; what the first one's names mean, and what launches."""

    def make(build: str, driver: str) -> SimpleNamespace:
        module = {}
        exec(build, module)
        names = {"compile_module_from_src": module["compile_module_from_src"]}
        exec(driver, names)
        runtime = SimpleNamespace(driver=SimpleNamespace(active=SimpleNamespace(launcher_cls=names["Launcher"])))
        found = {"triton.runtime": runtime}
        monkeypatch.setattr(launch_code, "importlib", SimpleNamespace(import_module=found.__getitem__))
        return SimpleNamespace(module=module, Launcher=names["Launcher"])

    return make


def test_it_is_compiled_and_not_loaded(triton):
    made = triton(BUILD, DRIVER)
    for _ in range(2):
        launch_code.compile_ahead(KERNEL)
    assert made.module["compiled"] == ["signature 4"] and not made.module["loaded"]
    launcher = made.Launcher(KERNEL.src, KERNEL.metadata)
    assert launcher.launch == "INCLUDE/SIGNATURE 4" and made.module["loaded"] == ["include/signature 4"]
    assert made.module["compiled"] == ["signature 4"]


def test_errors_of_the_compiler_come_up(triton):
    def refuse(source):
        raise FileNotFoundError("gcc")

    triton(BUILD, DRIVER).module["compiled"] = SimpleNamespace(append=refuse)
    with pytest.raises(FileNotFoundError, match="gcc"):
        launch_code.compile_ahead(KERNEL)


@pytest.mark.parametrize(
    ("build", "driver"),
    [(BUILD.replace("_load_module_from_path", "_load"), DRIVER), (BUILD, WITHOUT_C)],
    ids=["loads otherwise", "without C, as 3.7"],
)
def test_a_triton_that_is_made_otherwise_is_left_alone(triton, build, driver):
    made = triton(build, driver)
    launch_code.compile_ahead(KERNEL)
    assert not made.module["compiled"] and not made.module["loaded"]
    assert made.Launcher(KERNEL.src, KERNEL.metadata).launch
