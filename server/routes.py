"""The pack's routes on ComfyUI's server."""

import asyncio

from aiohttp import web

from .health import document

# Common names that a host of tomorrow or another pack may claim, whenever it is loaded: ours only fills the gap.
SHARED_PATHS = ("/health", "/api/health")


def add_health(server) -> None:
    """GET /zimage/health, and /health as long as nobody else has it: 200 with the state, 503 when no prompt can run."""

    @server.routes.get("/zimage/health")
    async def health(request: web.Request) -> web.Response:
        state = await asyncio.to_thread(document, server)
        return web.json_response(state, status=503 if state["status"] == "error" else 200)

    @web.middleware
    async def unclaimed_health(request: web.Request, handler) -> web.StreamResponse:
        # What nobody has registered is matched by the host's static files, or by nothing.
        unclaimed = isinstance(request.match_info.route.resource, web.StaticResource | None)
        if unclaimed and request.path in SHARED_PATHS and request.method in ("GET", "HEAD"):
            return await health(request)
        return await handler(request)

    server.app.middlewares.append(unclaimed_health)
