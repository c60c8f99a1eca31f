"""The workflow for several cards in a real browser; beside async tests the browser's driver could not run."""

import pytest
import torch

from zimage_turbo.launcher import pack_link

from .editor import SEVERAL
from .servers import running

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the two ranks of a machine without a GPU")


@pytest.fixture(scope="module")
def base(pack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi")
    pack_link.ensure(folder / "custom_nodes", pack)
    return folder


@pytest.fixture(scope="module")
def server(comfyui, base):
    """One of its own, which its ranks end with."""
    with running(comfyui, base, "server-browser-multi-gpu") as running_server:
        yield running_server


def test_the_shipped_workflow_runs_in_the_browser(newcomer):
    newcomer.close_templates()
    newcomer.open_from_list(SEVERAL)
    newcomer.set("ZImageTurboSampler", "steps", 2)
    newcomer.run()
    assert [(width, height) for _, width, height in newcomer.pictures(8)] == [(256, 256)] * 8
    newcomer.screenshot("multi_gpu")
