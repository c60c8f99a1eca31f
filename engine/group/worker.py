"""A rank: its server on loopback, its place among the ranks, and what it can be asked to do.

GET /pulse       a line of JSON a second: who and how this rank is; when the coordinator hangs up, the rank ends
GET /ping        one such line
POST /run/NAME   a message as in `wire`, with a name for it in the header Job; the answer is a stream of frames
POST /cancel     that job, by its header; it stops between steps
POST /stop       end this rank
"""

import asyncio
import contextlib
import datetime
import importlib
import json
import logging
import os
from collections.abc import Callable

import psutil
import torch
import torch.distributed as dist
from aiohttp import web

from . import loopback, shared, wire
from .faults import EXCHANGE
from .jobs import Job, Worker

PULSE_SECONDS = 1.0
_MIB = 1 << 20


class Rank:
    """What handlers of operations know: their place among the ranks, and what earlier ones kept in `models`, in
    `prompts`, and in `together` of ranks by their numbers. limit: of one exchange between ranks."""

    def __init__(self, number: int, size: int, device: torch.device, limit: datetime.timedelta):
        self.number, self.size, self.device, self.limit = number, size, device, limit
        self.models: dict[str, object] = {}
        self.prompts: dict[int, object] = {}
        self.together: dict[tuple[int, ...], object] = {}


Handler = Callable[[Rank, Job], wire.Tree]


def main(setup: dict, token: str, number: int, report: Callable[..., None]) -> None:
    """setup: as `launch` writes it; report(**facts): says them to the coordinator. Does not return."""
    logging.basicConfig(format=f"rank {number} %(levelname)s: %(message)s", level="INFO", force=True)
    asyncio.run(Server(setup, number).serve(token, report))
    # A job that hangs has a thread, which Python would wait for. With another code than 0, torchrun ends all others.
    os._exit(1)


class Server:
    """The rank as others on this machine see it."""

    def __init__(self, setup: dict, number: int):
        self.setup, self.number = setup, number
        self.ready, self.ended = False, asyncio.Event()
        self.gpu = setup["devices"][0] != "cpu"
        self.uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}" if self.gpu else None
        self.worker = Worker(lambda: torch.cuda.set_device(0) if self.gpu else None)
        modules = (importlib.import_module(f"{setup['package']}.{name}") for name in setup["operations"])
        self.handlers: dict[str, Handler] = {}
        for module in modules:
            self.handlers |= module.OPERATIONS

    async def serve(self, token: str, report: Callable[..., None]) -> None:
        routes = [
            web.get("/pulse", self.pulse),
            web.get("/ping", self.ping),
            web.post("/run/{operation}", self.run),
            web.post("/cancel", self.cancel),
            web.post("/stop", self.stop),
        ]
        first_port = self.setup["first_port"] + self.number
        _, port = await loopback.serve(routes, token, self.setup["body_limit"], self.setup["address"], first_port)
        probe = self.setup["probe"]
        shares = probe is not None and shared.reaches(shared.Reference(**probe), token)
        await asyncio.to_thread(report, url=f"http://{self.setup['address']}:{port}", shares=shares)
        joining = asyncio.create_task(self.joined(report))
        await self.ended.wait()
        joining.cancel()

    async def joined(self, report: Callable[..., None]) -> None:
        """Join the others; where that fails, say why, and end."""
        try:
            await asyncio.get_running_loop().run_in_executor(self.worker.thread, self.join)
        except Exception as error:
            logging.exception("joining the others failed.")
            await asyncio.to_thread(report, kind=EXCHANGE, fault=f"could not join the others: {error}")
            self.ended.set()

    def join(self) -> None:
        """Become one of the ranks; returns when all of them are there. Raises RuntimeError."""
        limit = datetime.timedelta(seconds=self.setup["exchange_limit"])
        device = torch.device("cuda", 0) if self.gpu else None
        dist.init_process_group("nccl" if self.gpu else "gloo", timeout=limit, device_id=device)
        self.rank = Rank(self.number, dist.get_world_size(), device or torch.device("cpu"), limit)
        dist.barrier()
        self.ready = True

    def state(self) -> dict:
        """Memory in MiB: on a GPU what torch holds there, else that of the process."""
        process = psutil.Process()
        memory = torch.cuda.memory_reserved() if self.gpu else process.memory_info().rss
        return {
            "rank": self.number,
            "pid": process.pid,
            "ready": self.ready,
            "busy": self.worker.busy(),
            "memory_mib": round(memory / _MIB),
            **({"uuid": self.uuid} if self.uuid else {}),
        }

    async def ping(self, request: web.Request) -> web.Response:
        return web.json_response(self.state())

    async def pulse(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):
            while not self.ended.is_set():
                await response.write(json.dumps(self.state()).encode() + b"\n")
                await asyncio.sleep(PULSE_SECONDS)
        self.ended.set()
        return response

    async def run(self, request: web.Request) -> web.StreamResponse:
        operation = request.match_info["operation"]
        if operation not in self.handlers:
            return _wrong(404, f"ranks know no operation '{operation}', but: {', '.join(self.handlers)}")
        if not self.ready:
            return _wrong(503, "the ranks have not all joined yet")
        try:
            message = wire.unpack(await request.read())
        except ValueError as error:
            return _wrong(400, str(error))
        job = Job(request.headers["Job"], operation, message, asyncio.get_running_loop())
        handler = self.handlers[operation]
        self.worker.add(job, lambda job: handler(self.rank, job))
        response = web.StreamResponse()
        try:
            await response.prepare(request)
            while (frame := await job.frames.get()) is not None:
                for piece in wire.frame(*frame):
                    await response.write(piece)
        except ConnectionResetError:  # whoever asked is gone
            job.cancel()
        finally:
            del self.worker.jobs[job.name]
        return response

    async def cancel(self, request: web.Request) -> web.Response:
        job = self.worker.jobs.get(request.headers["Job"])
        if job is not None:  # else it has ended meanwhile
            job.cancel()
        return web.Response()

    async def stop(self, request: web.Request) -> web.Response:
        self.ended.set()
        return web.Response()


def _wrong(status: int, what: str) -> web.Response:
    return web.json_response({"error": what}, status=status)
