"""GET /health on a GPU: what it holds and, after a kernel fault, 503 with the reason."""

import pytest
import torch

from zimage_turbo.launcher import pack_link
from zimage_turbo.tests.e2e.client import Client
from zimage_turbo.tests.e2e.graphs import node, turbo
from zimage_turbo.tests.e2e.servers import running

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

FAULT = '''
import torch
from comfy_api.latest import ComfyExtension, io

KEPT = []  # freeing memory after the fault would abort the process instead of raising


class KernelFault(io.ComfyNode):
    """An index past the end on the device: every later CUDA call of the process fails."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="KernelFault", inputs=[], outputs=[io.String.Output()], is_output_node=True)

    @classmethod
    def execute(cls):
        values, past_the_end = torch.zeros(4, device="cuda"), torch.tensor([1000], device="cuda")
        KEPT.extend((values, past_the_end, values[past_the_end]))
        torch.cuda.synchronize()
        return io.NodeOutput("")


class Extension(ComfyExtension):
    async def get_node_list(self):
        return [KernelFault]


async def comfy_entrypoint():
    return Extension()
'''


async def test_health_before_and_after_a_cuda_error(comfyui, pack, tmp_path):
    pack_link.ensure(tmp_path / "custom_nodes", pack)
    (tmp_path / "custom_nodes" / "kernel_fault").mkdir()
    (tmp_path / "custom_nodes" / "kernel_fault" / "__init__.py").write_text(FAULT, encoding="utf-8")
    with running(comfyui, tmp_path, "server-gpu") as server:
        async with Client.connected(server.url) as client:
            assert (await client.run(turbo(seed=1))).status == "success"
            state = await client.get("/health")
            assert state["status"] == "ok" and state["device"].startswith("cuda")
            assert "Lumina2" in {entry["model"] for entry in state["loaded_models"]}
            gpu = state["memory"]["gpus"][0]
            assert torch.cuda.get_device_name(0) == gpu["name"]
            assert 0 < gpu["used_mib"] < gpu["total_mib"]

            assert (await client.run({"1": node("KernelFault")})).status == "error"
            status, state = await client.answer("GET", "/health")
            assert status == 503
            assert state["status"] == "error"
            assert "CUDA" in state["reason"] and "Restart ComfyUI" in state["reason"]
            assert state["last_error"]["node"] == "KernelFault"
