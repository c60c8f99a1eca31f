"""The pack's routes on ComfyUI's server."""

import asyncio
import logging

from aiohttp import web

from .health import document

PATHS = ("/health", "/zimage/health")


def add_health(server) -> None:
    """GET /health and /zimage/health: 200 with the state, or 503 when no prompt can be run.

    A path that somebody else has registered is left to them; /zimage/health is ours.
    """
    taken = {route.path for route in server.routes if hasattr(route, "path")}

    async def health(request: web.Request) -> web.Response:
        state = await asyncio.to_thread(document, server)
        return web.json_response(state, status=200 if state["status"] == "ok" else 503)

    for path in PATHS:
        if path in taken:
            logging.info("Z-Image-Turbo: %s belongs to another pack; ours is at /zimage/health.", path)
        else:
            server.routes.get(path)(health)
