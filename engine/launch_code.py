"""What Triton launches a kernel with: C that its versions up to 3.6 compile at the kernel's first launch, a tenth of a
second each. Here it is compiled ahead, on any thread; it is loaded where the kernel is launched, as without us.
"""

import contextlib
import importlib
from types import FunctionType, SimpleNamespace
from typing import Any


class Compiled(Exception):
    """Raised where Triton would load what it has compiled."""


def compile_ahead(kernel: Any) -> None:
    """Compile the C of a compiled kernel into Triton's cache on disk, if Triton is made as its versions 3.4 to 3.6 are.
    Raises what compiling raises."""
    construct = importlib.import_module("triton.runtime").driver.active.launcher_cls.__init__
    if "compile_module_from_src" not in construct.__code__.co_names:
        return
    compiling = construct.__globals__["compile_module_from_src"]
    if "_load_module_from_path" not in compiling.__code__.co_names:
        return
    compiling = _copy(compiling, _load_module_from_path=_leave)
    with contextlib.suppress(Compiled):
        _copy(construct, compile_module_from_src=compiling)(SimpleNamespace(), kernel.src, kernel.metadata)


def _leave(name: str, path: str) -> None:
    raise Compiled


def _copy(function: FunctionType, **names: object) -> FunctionType:
    """The same function, to which these global names mean something else."""
    copy = FunctionType(
        function.__code__, function.__globals__ | names, None, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
