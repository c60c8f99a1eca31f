"""A user of a ComfyUI server who posts prompts, waits for their pictures and looks at the clock."""

import asyncio
import io
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import numpy as np
from PIL import Image

from .contestants import Graph

PATIENCE = 1800  # seconds without a word: a first prompt may read 20 GB from a slow disk and compile


class PromptFailed(Exception):
    """The server refused a prompt or could not run it; the message is the server's."""


class Client:
    def __init__(self, url: str, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse, name: str):
        self.url, self.session, self.socket, self.name = url, session, socket, name

    @classmethod
    @asynccontextmanager
    async def connected(cls, url: str) -> AsyncIterator["Client"]:
        name = uuid.uuid4().hex
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.ws_connect(f"{url}/ws", params={"clientId": name}, max_msg_size=0) as socket,
        ):
            yield cls(url, session, socket, name)

    async def post(self, graph: Graph) -> str:
        """Queue a prompt; its id. Raises PromptFailed."""
        async with self.session.post(f"{self.url}/prompt", json={"prompt": graph, "client_id": self.name}) as answer:
            body = await answer.json()
        if answer.status != 200:
            raise PromptFailed(_refusal(body))
        return body["prompt_id"]

    async def finished(self, prompt_id: str) -> list[dict[str, str]]:
        """Wait until the history has a prompt; the names of its pictures. Raises PromptFailed, ConnectionError."""
        while True:
            message = await asyncio.wait_for(self.socket.receive(), PATIENCE)
            if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                raise ConnectionError("the server closed the connection")
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            content = json.loads(message.data)
            # The server says that nothing runs any more once the history has the prompt.
            if content["type"] == "executing" and content["data"] == {"node": None, "prompt_id": prompt_id}:
                break
        async with self.session.get(f"{self.url}/history/{prompt_id}") as answer:
            entry = (await answer.json())[prompt_id]
        if entry["status"]["status_str"] != "success":
            raise PromptFailed(_failure(dict(entry["status"]["messages"])))
        return [image for output in entry["outputs"].values() for image in output.get("images", [])]

    async def timed(self, graph: Graph) -> tuple[float, list[dict[str, str]]]:
        """Seconds from posting a prompt until the history has its pictures, and their names."""
        start = time.perf_counter()
        images = await self.finished(await self.post(graph))
        return time.perf_counter() - start, images

    async def picture(self, image: dict[str, str]) -> np.ndarray:
        """A saved picture, uint8 [height, width, 3]."""
        query = {key: image[key] for key in ("filename", "subfolder", "type")}
        async with self.session.get(f"{self.url}/view", params=query, raise_for_status=True) as answer:
            return np.asarray(Image.open(io.BytesIO(await answer.read())).convert("RGB"))

    async def stats(self) -> dict:
        """What the server says of itself and its devices."""
        async with self.session.get(f"{self.url}/system_stats", raise_for_status=True) as answer:
            return await answer.json()


def _refusal(body: dict) -> str:
    """The reasons in the server's answer to a prompt that it did not take."""
    nodes = body.get("node_errors") or {}
    details = [
        f"{node['class_type']}: {error['message']}, {error['details']}"
        for node in nodes.values()
        for error in node["errors"]
    ]
    return "; ".join(details) or str(body.get("error"))


def _failure(messages: dict[str, dict]) -> str:
    """Which node failed and the first line of why."""
    error = messages.get("execution_error")
    if error is None:
        return "interrupted"
    return f"{error['node_type']}: {error['exception_message'].strip().partition(chr(10))[0]}"
