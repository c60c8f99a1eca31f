"""The coordinator of a group of ranks: starts them, asks them, and starts them anew after a fault.

It is in no collective, and what it does runs on an event loop of its own thread: a rank that hangs holds up nobody but
those who wait for it, and these no longer than their limit.
"""

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from urllib.parse import urlsplit

from . import wire
from .faults import DEVICE, ENDED, Fault, GroupError, Refused
from .launch import Setup
from .shared import Parcel
from .team import Limits, Team

STARTING, OK, DEGRADED, FAILED, CLOSED = "starting", "ok", "degraded", "failed", "closed"
STARTS = 2  # in a row, before a group has failed
FRESH_SECONDS = 60.0  # for which a failed start ahead is the answer to who asks; later it may be another's
BARREN_FAULTS = 4  # in a row without a request done: then it is started only when it is wanted
LOOK_SECONDS = 0.05  # between looks whether the user has interrupted
Plan = Callable[[int], dict[int, wire.Tree]]


class Group:
    """Ranks on the devices of `setup`, started at the first request.

    devices: asked at each start, which of them are there now; None for all. Methods may be called from any thread but
    the group's own. about: what those who use the group have `document` say of that use, JSON-ready.
    """

    def __init__(
        self, setup: Setup, limits: Limits | None = None, devices: Callable[[], Sequence[str]] | None = None
    ) -> None:
        self.setup, self.limits = setup, limits or Limits()
        self._devices = devices or (lambda: setup.devices)
        self.about: dict[str, object] = {}
        self._kept: dict[str, tuple[str, wire.Tree, float]] = {}
        self._calls, self._used = 0, time.monotonic()
        self._team: Team | None = None
        self._starting: asyncio.Task[Team] | None = None
        self._heard: asyncio.Task[Team] | None = None  # the start whose failure a request was told
        self._unheard: tuple[GroupError, float] | None = None  # that of one which nobody was, and when
        self._ending: asyncio.Task[None] | None = None
        self._closed, self._gate = False, threading.Lock()
        self._starts = self._barren = 0
        self._state = {"state": STARTING, "reason": "not asked for anything yet", "since": time.time()}
        self._last_fault: dict | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="group", daemon=True)
        self._thread.start()

    def start(self) -> int:
        """Start the ranks unless they run, and wait. Returns how many there are. Raises GroupError."""
        with self._in_use():
            return len(self._submit(self._ready()).result().members)

    def begin(self) -> None:
        """`start` without waiting. If it fails before anybody asks, that is the answer to who asks next, and soon."""
        with self._in_use():
            self._submit(self._ready(ahead=True))

    def call(
        self,
        operation: str,
        plan: Plan,
        limit_s: float,
        on_progress: Callable[[int, wire.Tree], object] | None = None,
        check: Callable[[], object] | None = None,
    ) -> dict[int, wire.Tree]:
        """What ranks answer, by rank.

        plan(size): what to ask each of so many ranks for; asked again, on a thread of its own, after a fault, when the
        request is made once more of ranks that were started anew. limit_s: seconds on the ranks, of each attempt.
        on_progress(rank, message) and check() are called on this thread; what they raise stops the request, between
        steps. Raises Refused for a wrong request, wire.Unsendable, and GroupError.
        """
        events: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        with self._in_use():
            request = self._request(operation, plan, lambda rank, body: events.put((rank, body)), limit_s)
            future = self._submit(request)
            future.add_done_callback(lambda _: events.put(None))
            try:
                while (event := _next(events, check)) is not None:
                    rank, body = event
                    if on_progress is not None:
                        on_progress(rank, wire.unpack(body))
            except BaseException:
                future.cancel()
                raise
            return {rank: wire.unpack(body) for rank, body in sorted(future.result().items())}

    def keep(self, key: str, operation: str, request: wire.Tree, limit_s: float, **watching) -> None:
        """Ask it of all ranks now, and of all that are started in their place, until `drop`. Raises as `call` does.

        key: one that is there already is replaced; by nothing if this raises.
        """
        self._kept[key] = (operation, request, limit_s)
        try:
            self.call(operation, lambda size: dict.fromkeys(range(size), request), limit_s, **watching)
        except BaseException:
            self.drop(key)  # what ranks have of the one before, nobody knows
            raise

    def kept(self, key: str) -> wire.Tree:
        """The request that `keep` was given last under this key; None if there is none."""
        return self._kept.get(key, ("", None, 0.0))[1]

    def drop(self, key: str) -> None:
        """No longer ask ranks that are started anew for what `keep` was given."""
        self._kept.pop(key, None)

    @property
    def shares(self) -> bool:
        """Whether the ranks that there are now can open `shared` memory of this process."""
        team = self._team
        return team is not None and team.shares

    def close(self) -> None:
        """End the ranks; returns when no process of theirs is left. Requests that run fail."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def used(self) -> float:
        """When it last worked for somebody, by time.monotonic(): now while it does."""
        return time.monotonic() if self._calls else self._used

    def places(self, check: Callable[[], object] | None = None) -> dict[int, tuple[str, str]]:
        """The machine's address and the device of each rank, by its number. Starts them if need be, as `start`; what
        check() raises ends the wait."""
        with self._in_use():
            future, done = self._submit(self._placed()), queue.SimpleQueue()
            future.add_done_callback(lambda _: done.put(None))
            try:
                _next(done, check)
            except BaseException:
                future.cancel()
                raise
            return future.result()

    def document(self) -> dict:
        """JSON-ready state, without waiting: `state` is one of the names above, with a reason; times in seconds since
        1970; ranks as they last said."""
        team = self._team
        members = sorted(team.members.items()) if team else []
        return {
            **self._state,
            **self.about,
            "asked": len(self.setup.devices),
            "ranks": [{**member.state, "device": member.device} for _, member in members],
            "starts": self._starts,
            "last_fault": self._last_fault,
        }

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._gate:
            self._calls += 1
        try:
            yield
        finally:
            with self._gate:
                self._calls, self._used = self._calls - 1, time.monotonic()

    def _submit(self, work: Coroutine) -> Future:
        """Have it run on the group's thread. Raises GroupError after `close`, which waits for what came before."""
        with self._gate:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise _closed()

    def _enter(self, state: str, reason: str) -> None:
        self._state = {"state": state, "reason": reason, "since": time.time()}

    async def _request(
        self, operation: str, plan: Plan, on_progress: Callable[[int, bytes], object], limit_s: float
    ) -> dict[int, bytes]:
        fault = None
        for _ in range(2):
            team = await self._ready()
            try:
                with _parcel(team) as parcel:
                    bodies = await asyncio.to_thread(_packed, plan, len(team.members), parcel)
                    answers = await team.run(operation, bodies, on_progress, limit_s)
            except Fault as found:
                fault = found
                continue
            self._barren = 0
            return answers
        raise GroupError(f"'{operation}' failed on several GPUs, twice: {fault}. {fault.remedy}") from fault

    async def _placed(self) -> dict[int, tuple[str, str]]:
        own = self.setup.address
        members = sorted((await self._ready()).members.items())
        return {
            number: (own if member.process else urlsplit(member.url).hostname, member.device)
            for number, member in members
        }

    async def _ready(self, ahead: bool = False) -> Team:
        """The team that works, started if need be. ahead: of a request. Raises GroupError."""
        if self._closed:
            raise _closed()
        if self._starting is None or (self._starting.done() and self._starting.exception()):
            unheard, self._unheard = self._unheard, None
            if unheard and not ahead and time.monotonic() - unheard[1] < FRESH_SECONDS:
                raise unheard[0]
            self._start_over()
        starting = self._starting
        try:
            return await asyncio.shield(starting)
        except GroupError as error:
            if not ahead:
                self._heard, self._unheard = starting, None
            elif self._heard is not starting and self._starting is starting:
                self._unheard = error, time.monotonic()
            raise
        except asyncio.CancelledError:
            if self._closed:
                raise _closed() from None
            raise

    def _start_over(self) -> None:
        self._unheard = None
        self._starting = asyncio.get_running_loop().create_task(self._start())
        self._starting.add_done_callback(self._started)

    def _started(self, task: asyncio.Task) -> None:
        """Nobody may be waiting for a start; whoever asks later has it tried again."""
        if not task.cancelled() and task.exception():
            self._enter(FAILED, str(task.exception()))

    async def _start(self) -> Team:
        """A team that is ready, when the one before has ended. Raises GroupError."""
        if self._state["state"] != DEGRADED:
            self._enter(STARTING, "the ranks are being started")
        if self._ending is not None:
            await asyncio.shield(self._ending)
        began, broken, failed = time.monotonic(), {}, []
        while len(failed) < STARTS:
            devices = tuple(device for device in self._devices() if device not in broken)
            if not devices:
                break
            team = Team(dataclasses.replace(self.setup, devices=devices), self.limits, self._lost)
            self._starts += 1
            try:
                await team.start()
                await self._brought_up(team)
            except (Fault, Refused, OSError) as error:
                tail = await asyncio.shield(team.end())
                self._last_fault = {"what": str(error), "time": time.time()}
                logging.warning("Z-Image-Turbo: multi-gpu did not start: %s.%s", error, _quoted(tail))
                if isinstance(error, Fault) and error.kind == DEVICE and error.device in devices:
                    broken[error.device] = str(error)
                else:
                    failed.append(str(error))
                continue
            except BaseException:  # cancelled, or a mistake of ours: no process may be left
                await team.end()
                raise
            self._team = team
            self._announce(team, broken, time.monotonic() - began)
            return team
        why = "; ".join(failed[-1:] or broken.values()) or "none of the devices asked for is there"
        raise GroupError(f"multi-gpu could not start: {why}. The log above has what its processes said.")

    async def _brought_up(self, team: Team) -> None:
        """What was asked to be kept is asked of new ranks."""
        for operation, request, limit_s in list(self._kept.values()):
            with _parcel(team) as parcel:
                body = await asyncio.to_thread(wire.pack, request, parcel)
                await team.run(operation, dict.fromkeys(team.members, body), lambda *_: None, limit_s)

    def _announce(self, team: Team, broken: dict[str, str], seconds: float) -> None:
        elsewhere = sum(member.process is None for member in team.members.values())
        count, asked = len(team.members), len(self.setup.devices) + elsewhere
        names = ", ".join(member.device for _, member in sorted(team.members.items()))
        said = f"{count} of {asked} ranks ready in {seconds:.1f} s: {names}"
        if count < asked:
            said += "".join(f"; {why}" for why in broken.values())
        self._enter(OK if count == asked else DEGRADED, said)
        logging.log(logging.INFO if count == asked else logging.WARNING, "Z-Image-Turbo: multi-gpu has %s.", said)

    def _lost(self, team: Team) -> None:
        """At a team's first fault: it is ended, and others take its place, even if nobody asks for anything now."""
        if team is not self._team:  # it did not get ready: `_start` knows
            return
        fault = team.fault.result()
        self._team = None
        self._barren += 1
        self._last_fault = {"what": str(fault), "time": time.time()}
        logging.warning("Z-Image-Turbo: multi-gpu: %s. The ranks are ended. %s", fault, fault.remedy)
        self._ending, self._starting = asyncio.get_running_loop().create_task(self._ended(team)), None
        if self._barren < BARREN_FAULTS:
            self._enter(DEGRADED, f"{fault}; the ranks are being started anew")
            self._start_over()
        else:
            self._enter(FAILED, f"{fault}, the last of {self._barren} faults in a row; the next request starts anew")

    async def _ended(self, team: Team) -> None:
        tail = await team.end()
        if tail:
            logging.warning("Z-Image-Turbo: the ranks' last lines:%s", _quoted(tail))

    async def _close(self) -> None:
        team, self._team = self._team, None
        if self._starting is not None:
            self._starting.cancel()
        if team is not None:
            team.fail(Fault(ENDED, "was closed"))
            await team.end()
        others = asyncio.all_tasks() - {asyncio.current_task()}  # they are at their end, and say so to who waits
        await asyncio.gather(*others, return_exceptions=True)
        self._enter(CLOSED, "multi-gpu is no longer used, or with other GPUs")


def _closed() -> GroupError:
    return GroupError("multi-gpu was closed, or is used with other GPUs now. Queue the prompt again.")


def _next(events: queue.SimpleQueue, check: Callable[[], object] | None):
    """The next event; check() is called while there is none, and before each."""
    while True:
        if check is not None:
            check()
        try:
            return events.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            continue


def _parcel(team: Team) -> contextlib.AbstractContextManager[Parcel | None]:
    """For the large tensors of a request; ranks have opened them when they have answered."""
    return contextlib.closing(Parcel()) if team.shares else contextlib.nullcontext()


def _packed(plan: Plan, size: int, parcel: Parcel | None) -> dict[int, bytes]:
    """Bodies by rank; one that several ranks get is packed once."""
    packed: dict[int, bytes] = {}
    requests = plan(size)
    for request in requests.values():
        if id(request) not in packed:
            packed[id(request)] = wire.pack(request, parcel)
    return {rank: packed[id(request)] for rank, request in requests.items()}


def _quoted(lines: Sequence[str]) -> str:
    return "".join(f"\n    {line}" for line in lines)
