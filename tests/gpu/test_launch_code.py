"""Which thread compiles the C that Triton launches kernels with."""

import collections
import subprocess
import sysconfig
import threading
from pathlib import Path

import pytest
import torch

from zimage_turbo.engine import rehearsal
from zimage_turbo.kernels import swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
DEVICE = torch.device("cuda:0")


@pytest.fixture
def threads(tmp_path, monkeypatch):
    """What is compiled from C, and the names of the threads that do it, from an empty cache on."""
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = collections.defaultdict(set)

    def build(name, source, folder, library_folders, include_folders, libraries):
        names[name].add(threading.current_thread().name)
        target = Path(folder, "built.so")
        folders = [*include_folders, sysconfig.get_paths("posix_prefix")["include"]]
        options = [f"-I{each}" for each in folders] + [f"-L{each}" for each in library_folders]
        command = ["cc", source, "-shared", "-fPIC", "-o", str(target), *options, *(f"-l:{each}" for each in libraries)]
        subprocess.run(command, check=True)
        return str(target)

    monkeypatch.setattr(knobs.build, "impl", build)
    return names


def test_it_is_one_that_does_not_draw(threads):
    a, b = torch.randn(2, 5, 24, device=DEVICE).unbind()  # of a width that nothing else has: its kernel is not there
    expected = swiglu.silu_mul(a, b, backend="torch")
    got = rehearsal.rehearsed(lambda *given: swiglu.silu_mul(*given, backend="triton"), DEVICE)(a, b)
    torch.testing.assert_close(got, expected)
    if "__triton_launcher" not in threads:
        pytest.skip("this Triton compiles no C for a kernel")
    assert all(name.startswith("compile") for name in threads["__triton_launcher"])
