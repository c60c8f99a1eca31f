"""A user of the server: posts prompts over HTTP and hears over a websocket what becomes of them."""

import asyncio
import io
import json
import struct
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

SILENCE_SECONDS = 90
PREVIEW_WITH_METADATA = 4  # the host's number for this binary message


@dataclass(frozen=True)
class Event:
    """One websocket message. A preview has the kind 'preview' and its picture's bytes under ``image``."""

    kind: str
    data: dict[str, Any]

    @classmethod
    def read(cls, message: aiohttp.WSMessage) -> "Event":
        if message.type is aiohttp.WSMsgType.TEXT:
            content = json.loads(message.data)
            return cls(content["type"], content["data"])
        if message.type is not aiohttp.WSMsgType.BINARY:
            raise ConnectionError(f"the server closed the websocket: {message}")
        number, length = struct.unpack_from(">II", message.data)
        if number != PREVIEW_WITH_METADATA:
            return cls(f"binary {number}", {})
        metadata = json.loads(message.data[8 : 8 + length])
        return cls("preview", metadata | {"image": message.data[8 + length :]})


@dataclass
class Result:
    """What became of a prompt, by the server's history, and the events that told of it."""

    prompt_id: str
    status: str
    outputs: dict[str, dict]
    messages: dict[str, dict]
    events: list[Event] = field(repr=False)

    @property
    def error(self) -> dict[str, Any]:
        """Details of the node error that ended it."""
        return self.messages["execution_error"]

    @property
    def images(self) -> list[dict[str, str]]:
        return [image for output in self.outputs.values() for image in output.get("images", [])]

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [event.data for event in self.events if event.kind == kind]


class Client:
    def __init__(self, url: str, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse, name: str):
        self.url, self.session, self.socket, self.name = url, session, socket, name
        self.heard: list[Event] = []

    @classmethod
    @asynccontextmanager
    async def connected(cls, url: str) -> AsyncIterator["Client"]:
        name = uuid.uuid4().hex
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{url}/ws", params={"clientId": name}, max_msg_size=0) as socket,
        ):
            # As the editor does: previews then say which prompt and node they belong to.
            await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            yield cls(url, session, socket, name)

    async def get(self, path: str, **query: str) -> Any:
        status, body = await self.answer("GET", path, params=query)
        assert status == 200, f"GET {path}: {status} {body}"
        return body

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return await self.answer("POST", path, json=body)

    async def answer(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        """Status and body, read as JSON where it is."""
        async with self.session.request(method, f"{self.url}{path}", **options) as response:
            text = await response.text()
            is_json = response.content_type == "application/json"
            return response.status, json.loads(text) if is_json and text else text

    async def offer(self, prompt: dict[str, Any], **extra_data: Any) -> tuple[int, dict[str, Any]]:
        """Post a prompt; status and body of the server's answer."""
        return await self.post("/prompt", {"prompt": prompt, "client_id": self.name, "extra_data": extra_data})

    async def queue(self, prompt: dict[str, Any], **extra_data: Any) -> str:
        """Post a prompt that must be accepted; its id."""
        status, body = await self.offer(prompt, **extra_data)
        assert status == 200, body
        return body["prompt_id"]

    async def hear(self, kind: str, **expected: Any) -> Event:
        """Wait for the next event of this kind whose data holds the expected values."""
        while True:
            event = Event.read(await asyncio.wait_for(self.socket.receive(), SILENCE_SECONDS))
            self.heard.append(event)
            if event.kind == kind and all(event.data.get(key) == value for key, value in expected.items()):
                return event

    async def finish(self, prompt_id: str) -> Result:
        """Wait for the end of a prompt, good or bad."""
        await self.hear("executing", node=None, prompt_id=prompt_id)  # sent when the history has it
        entry = (await self.get(f"/history/{prompt_id}"))[prompt_id]
        events = [event for event in self.heard if event.data.get("prompt_id") == prompt_id]
        return Result(
            prompt_id, entry["status"]["status_str"], entry["outputs"], dict(entry["status"]["messages"]), events
        )

    async def run(self, prompt: dict[str, Any], **extra_data: Any) -> Result:
        return await self.finish(await self.queue(prompt, **extra_data))

    async def draw(self, prompt: dict[str, Any]) -> np.ndarray:
        """Run a prompt that must succeed; its pictures, uint8 [pictures, height, width, 3]."""
        result = await self.run(prompt)
        assert result.status == "success", result.messages
        return np.stack([np.asarray(await self.picture(image)) for image in result.images])

    async def picture(self, image: dict[str, str]) -> Image.Image:
        """A saved picture, decoded, with its metadata in ``info``."""
        query = {key: image[key] for key in ("filename", "subfolder", "type")}
        async with self.session.get(f"{self.url}/view", params=query) as response:
            assert response.status == 200, f"{image}: {response.status}"
            picture = Image.open(io.BytesIO(await response.read()))
            picture.load()
            return picture
