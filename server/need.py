"""Whether multi-gpu is still needed, as far as what is asked of the server tells.

The host drops what nodes gave when memory runs short: with more than 128 GB to spare, never. A MODEL on several GPUs
that no prompt uses any more is alive there all the same, so that its processes would stay beside every other workflow.
"""

from typing import Any

from aiohttp import web

from ..engine.devices import MULTI_GPU
from ..engine.group.current import FREE_SECONDS, current

FREE_PATHS = ("/free", "/api/free")


def watch(server) -> None:
    """The processes end a while after a prompt was posted that does without them, and soon after memory is to be freed.

    Another prompt for them that is posted meanwhile keeps them. So does one that runs, as it may load and encode for a
    while before it asks them; and one that waits, unless memory is to be freed.
    """

    def wanted(waiting: bool) -> bool:
        running, queued = server.prompt_queue.get_current_queue_volatile()
        return any(needs_several(prompt) for _, _, prompt, *_ in (*running, *(queued if waiting else ())))

    def posted(body: Any) -> Any:
        if needs_several(body.get("prompt") if isinstance(body, dict) else None):
            current.stay()
        else:
            current.leave()
        return body

    @web.middleware
    async def freed(request: web.Request, handler) -> web.StreamResponse:
        response = await handler(request)
        if request.method == "POST" and request.path in FREE_PATHS and response.status == 200:
            asked = await request.json()
            if asked.get("unload_models") or asked.get("free_memory"):
                current.leave(FREE_SECONDS, waiting=False)
        return response

    current.wanted = wanted
    server.add_on_prompt_handler(posted)
    server.app.middlewares.append(freed)


def needs_several(prompt: Any) -> bool:
    """Whether a node of a prompt, as it was posted, is to compute on several GPUs, or on what another node says."""
    nodes = prompt.values() if isinstance(prompt, dict) else ()
    inputs = [node.get("inputs") for node in nodes if isinstance(node, dict)]
    devices = [own.get("device") for own in inputs if isinstance(own, dict)]
    return any(device == MULTI_GPU or isinstance(device, list) for device in devices)
