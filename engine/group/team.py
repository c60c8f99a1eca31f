"""One start of the ranks, as the coordinator sees it: who they are, how they are, and what they are asked.

All of it runs on the group's event loop. A team never recovers: after its first fault it is to be ended.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp
import psutil
from aiohttp import web

from . import launch, loopback, shared, wire
from .faults import ENDED, EXCHANGE, REMEDIES, SILENT, SLOW, START, STUCK, Fault, Refused

REPORT_LIMIT = 1 << 16
POLL_SECONDS = 0.1
OnProgress = Callable[[int, bytes], object]
Handler = Callable[[web.Request], Awaitable[web.Response]]


@dataclass(frozen=True)
class Limits:
    """Seconds. start: until all ranks are ready; silence: between two signs of life; stop: until a rank that was told
    to stop its work has."""

    start: float = 180.0
    silence: float = 15.0
    stop: float = 60.0


@dataclass
class Member:
    """A rank: where it is, its last sign of life, and whose turn it is to ask it. process: None on another machine;
    shares: whether it can open memory that this process shares."""

    number: int
    device: str
    url: str
    process: psutil.Process | None
    shares: bool
    state: dict = field(default_factory=dict)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Team:
    """on_fault(team) is called once, at the first fault, which is then in `fault`."""

    def __init__(self, setup: launch.Setup, limits: Limits, on_fault: Callable[["Team"], object]):
        self.setup, self.limits, self.on_fault = setup, limits, on_fault
        self.members: dict[int, Member] = {}
        self.fault: asyncio.Future[Fault] = asyncio.get_running_loop().create_future()
        self._token = launch.new_token(setup)
        self._arrived = asyncio.Event()
        self._jobs = itertools.count()
        self._tasks: list[asyncio.Task] = []
        self._resources = contextlib.AsyncExitStack()
        self._processes: launch.Processes | None = None
        self._probe: shared.Reference | None = None

    @property
    def shares(self) -> bool:
        """Whether all ranks can open memory that this process shares."""
        return all(member.shares for member in self.members.values())

    def fail(self, fault: Fault) -> Fault:
        """Note a fault; returns the team's first, which caused what came after."""
        if not self.fault.done():
            self.fault.set_result(fault)
            self.on_fault(self)
        return self.fault.result()

    async def start(self) -> None:
        """Start the processes and wait until all ranks are ready. Raises Fault."""
        routes = [web.post("/report", _weakly(self._report)), web.get("/setup", _weakly(self._told))]
        runner, port = await loopback.serve(
            routes, self._token, REPORT_LIMIT, self.setup.address, self.setup.first_port
        )
        self._report_to = f"http://{self.setup.address}:{port}/report"
        self._resources.push_async_callback(runner.cleanup)
        if shared.possible():
            parcel, self._probe = shared.probe(self._token)
            self._resources.callback(parcel.close)
        if self.setup.hosts:
            others, url = self.setup.hosts.count - 1, f"http://{self.setup.address}:{port}"
            logging.info("Z-Image-Turbo: multi-gpu waits for %d more: python install.py join %s", others, url)
        self._session = aiohttp.ClientSession(
            headers=loopback.headers(self._token),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.limits.silence),
            connector=aiohttp.TCPConnector(limit=0),
        )
        await self._resources.enter_async_context(self._session)
        self._processes = launch.Processes(self.setup, self._token, self._report_to, self._probe)
        self._task(self._watch())
        try:
            await asyncio.wait_for(self._unless_failed(self._ready()), self.limits.start)
        except asyncio.TimeoutError:
            missing = f"{self._unready()} not ready" if self.members else "no rank reported"
            if self.setup.hosts and not self.members:
                missing += f", which they do when all {self.setup.hosts.count} machines are there"
            what = f"took longer than {self.limits.start:g} s to start: {missing}"
            raise self.fail(Fault(START, what)) from None

    async def end(self) -> list[str]:
        """End all processes, whatever state they are in. Returns the last lines that they printed before."""
        for task in self._tasks:
            task.cancel()
        lines = await asyncio.to_thread(self._processes.last_lines) if self._processes else []
        elsewhere = [member for member in self.members.values() if member.process is None]
        ending = [self._post(member, "/stop") for member in elsewhere]
        if self._processes:
            here = [member.process for member in self.members.values() if member.process]
            ending.append(asyncio.to_thread(self._processes.end, here))
        await asyncio.gather(*ending)
        await self._resources.aclose()
        return lines

    async def run(
        self, operation: str, bodies: dict[int, bytes], on_progress: OnProgress, limit_s: float
    ) -> dict[int, bytes]:
        """The operation on some ranks, in turn with others' that are asked the same ranks: each one's result.

        bodies: for each rank; on_progress(rank, body) is called as they come. Raises Fault, and Refused for a request
        that is wrong. When cancelled, has the ranks stop first.
        """
        for rank, body in bodies.items():
            if len(body) > self.setup.body_limit:
                raise Refused(
                    f"The request '{operation}' of {len(body)} bytes for rank {rank} is over the limit of "
                    f"{self.setup.body_limit} bytes. Use fewer or smaller pictures at once."
                )
        async with contextlib.AsyncExitStack() as turns:
            for rank in sorted(bodies):  # always in this order: nobody waits for one who waits for him
                await turns.enter_async_context(self.members[rank].turn)
            if self.fault.done():
                raise self.fault.result()
            job = str(next(self._jobs))
            asking = {
                asyncio.create_task(self._ask(self.members[rank], operation, job, body, on_progress)): rank
                for rank, body in bodies.items()
            }
            try:
                return await self._answers(operation, asking, limit_s)
            except (Refused, asyncio.CancelledError):
                await self._stop(operation, job, asking)
                raise
            finally:
                for task in asking:
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)

    async def _answers(self, operation: str, asking: dict[asyncio.Task, int], limit_s: float) -> dict[int, bytes]:
        waiting, answers = dict(asking), {}
        end = time.monotonic() + limit_s
        while waiting:
            done, _ = await asyncio.wait(
                {*waiting, self.fault}, timeout=max(0.0, end - time.monotonic()), return_when=asyncio.FIRST_COMPLETED
            )
            if self.fault.done():
                raise self.fault.result()
            if not done:
                raise self._failure(SLOW, f"took longer than {limit_s:g} s for '{operation}'", min(waiting.values()))
            for task in done:
                answers[waiting.pop(task)] = task.result()
        return answers

    async def _stop(self, operation: str, job: str, asking: dict[asyncio.Task, int]) -> None:
        """Have ranks stop that still work on a job. Does not raise: one that does not stop is a fault of the team."""
        working = {task: rank for task, rank in asking.items() if not task.done()}
        if not working or self.fault.done():
            return
        await asyncio.gather(*(self._post(self.members[rank], "/cancel", job) for rank in working.values()))
        stopped = asyncio.gather(*working, return_exceptions=True)
        await asyncio.wait({stopped, self.fault}, timeout=self.limits.stop, return_when=asyncio.FIRST_COMPLETED)
        if not stopped.done():
            still = min(rank for task, rank in working.items() if not task.done())
            self._failure(STUCK, f"did not stop '{operation}' within {self.limits.stop:g} s", still)

    async def _ask(self, member: Member, operation: str, job: str, body: bytes, on_progress: OnProgress) -> bytes:
        try:
            async with self._session.post(
                f"{member.url}/run/{operation}", data=_pieces(body), headers={"Job": job}
            ) as response:
                if response.status != 200:
                    raise Refused(f"rank {member.number} refused '{operation}': {(await response.json())['error']}")
                while True:
                    kind, length = wire.HEAD.unpack(await response.content.readexactly(wire.HEAD.size))
                    answer = await response.content.readexactly(length)
                    if kind == wire.RESULT:
                        return answer
                    if kind == wire.ERROR:
                        raise await self._error(member.number, wire.unpack(answer))
                    on_progress(member.number, answer)
        except (aiohttp.ClientError, asyncio.IncompleteReadError, OSError) as error:
            raise self._failure(ENDED, f"ended during '{operation}'", member.number) from error

    async def _error(self, rank: int, error: dict) -> Exception:
        """What a rank said went wrong there."""
        if error["kind"] == EXCHANGE:  # as when another one has ended, which is about to be seen
            await asyncio.wait({self.fault}, timeout=POLL_SECONDS)
        if error["kind"] in REMEDIES:
            return self._failure(error["kind"], error["what"], rank)
        return Refused(error["what"] or error["kind"])

    def _failure(self, kind: str, what: str, rank: int) -> Fault:
        return self.fail(Fault(kind, what, rank, self.members[rank].device))

    async def _report(self, request: web.Request) -> web.Response:
        """A rank says where it is, or why it cannot start."""
        told = await request.json()
        here = told["address"] == self.setup.address
        device = told["device"] if here else f"{told['device']} at {told['address']}"
        if "fault" in told:
            self.fail(Fault(told["kind"], told["fault"], told["rank"], device))
            return web.Response()
        try:
            process = psutil.Process(told["pid"]) if here else None
        except psutil.NoSuchProcess:  # it ended while it reported: `_watch` will see
            return web.Response()
        member = Member(told["rank"], device, told["url"], process, told["shares"])
        self.members[member.number] = member
        self._task(self._listen(member))
        if len(self.members) == told["size"]:
            self._arrived.set()
        return web.Response()

    async def _told(self, request: web.Request) -> web.Response:
        """For node.py on another machine: how to start its ranks."""
        told = launch.told(self.setup, self._report_to, self._probe)
        options = launch.torchrun_options(self.setup)
        return web.json_response({"told": told, "torchrun": options, "comfyui": launch.comfyui()})

    async def _ready(self) -> None:
        await self._arrived.wait()
        for member in self.members.values():
            await member.ready.wait()

    def _unready(self) -> str:
        return ", ".join(f"rank {member.number}" for member in self.members.values() if not member.ready.is_set())

    async def _unless_failed(self, waiting) -> None:
        task = asyncio.ensure_future(waiting)
        try:
            await asyncio.wait({task, self.fault}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
        if self.fault.done():
            raise self.fault.result()

    async def _listen(self, member: Member) -> None:
        """A rank's signs of life, for as long as it lives. Its end is seen at once, as its connection's."""
        try:
            async with self._session.get(f"{member.url}/pulse") as response:
                response.raise_for_status()
                while line := await asyncio.wait_for(response.content.readline(), self.limits.silence):
                    member.state = json.loads(line)
                    if member.state["ready"]:
                        member.ready.set()
            self._failure(ENDED, "ended", member.number)
        except asyncio.TimeoutError:
            self._failure(SILENT, f"gave no sign of life for {self.limits.silence:g} s", member.number)
        except (aiohttp.ClientError, OSError):
            self._failure(ENDED, "ended", member.number)

    async def _watch(self) -> None:
        """torchrun itself, which also ends when a rank cannot start."""
        while (code := self._processes.exit_code()) is None:
            await asyncio.sleep(POLL_SECONDS)
        await asyncio.sleep(POLL_SECONDS)  # what ranks said last may be on its way
        self.fail(Fault(START if not self._arrived.is_set() else ENDED, f"ended with exit code {code}"))

    async def _post(self, member: Member, path: str, job: str = "") -> None:
        """Say something to a rank that may be beyond hearing it; its pulse, or its answer, shows what became of it."""
        try:
            limit = aiohttp.ClientTimeout(total=self.limits.silence)
            async with self._session.post(f"{member.url}{path}", headers={"Job": job}, timeout=limit):
                pass
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            logging.info("Z-Image-Turbo: rank %d did not take %s: %s", member.number, path, type(error).__name__)

    def _task(self, work) -> None:
        self._tasks.append(asyncio.create_task(work))


async def _pieces(body: bytes) -> AsyncIterator[memoryview]:
    for piece in wire.slices(body):
        yield piece


def _weakly(method: Handler) -> Handler:
    """The method without its object, which aiohttp would keep: it has the last thousand handlers of a process."""
    reference = weakref.WeakMethod(method)

    async def handler(request: web.Request) -> web.Response:
        return await reference()(request)

    return handler
