"""Z-Image-Turbo for ComfyUI. The entry point of the pack: its nodes, its routes, its web folder."""

from comfy_api.latest import ComfyExtension

from server import PromptServer

from .engine import layouts
from .nodes import NODES
from .server import need
from .server.routes import add_health

WEB_DIRECTORY = "./web"


class ZImageTurboExtension(ComfyExtension):
    async def on_load(self) -> None:
        layouts.register()  # a stock loader that is given a file of ours then says whose it is
        add_health(PromptServer.instance)
        need.watch(PromptServer.instance)

    async def get_node_list(self) -> list:
        return NODES


async def comfy_entrypoint() -> ComfyExtension:
    return ZImageTurboExtension()
