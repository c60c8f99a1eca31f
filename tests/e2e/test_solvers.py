"""A solver of a user's own: the pack that the help pages show, loaded before ours and used over the API."""

import json
import re

import pytest

from zimage_turbo.launcher import pack_link

from .client import Client
from .graphs import turbo
from .servers import running


@pytest.mark.parametrize("page", ["ZImageTurboSampler.md", "ZImageTurboSampler/zh.md"])
async def test_the_pack_of_the_help_page_adds_its_solver(comfyui, pack, tmp_path, page):
    text = (pack / "web" / "docs" / page).read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    base, extra = tmp_path / "base", tmp_path / "extra"
    (base / "custom_nodes" / "coarse").mkdir(parents=True)
    (base / "custom_nodes" / "coarse" / "__init__.py").write_text(code, encoding="utf-8")
    pack_link.ensure(extra / "custom_nodes", pack)  # the host loads an extra path's packs last
    paths = tmp_path / "extra_model_paths.yaml"
    paths.write_text(json.dumps({"second": {"base_path": str(extra), "custom_nodes": "custom_nodes"}}))
    with running(comfyui, base, "server-own-solver", "--extra-model-paths-config", paths) as server:
        async with Client.connected(server.url) as client:
            result = await client.run(turbo(solver="coarse", width=64, height=64))
            report = json.loads((await client.picture(result.images[0])).info["zimage_turbo"])
    assert (report["solver"], report["nfe"], report["budget"]) == ("coarse", 4, 8)
