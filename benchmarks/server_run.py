"""One contestant of the server benchmark: its server from start to end, and what is measured on it."""

import contextlib
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import numpy as np

from ..launcher import pack_link
from ..launcher.report import LauncherError
from ..launcher.server import Server, free_port
from .conditions import version
from .contestants import OURS, STOCK, Contestant, Graph, Request
from .gate import Gate, distance
from .server_client import Client, PromptFailed
from .server_memory import MemoryLog
from .timing import quantiles

GATE_PROMPT, OTHER_PROMPT, FIRST_TIMED = 0, 1, 2
TRITON = "triton"  # where in the base directory compiled kernels are kept
BREAKDOWNS = (LauncherError, PromptFailed, ConnectionError, TimeoutError, aiohttp.ClientError)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked of every contestant. models: the folder of `files`, which are named by their kind's folder."""

    tree: Path
    pack: Path
    work: Path
    models: Path
    files: dict[str, str]
    demo: bool
    sizes: list[int]
    batches: list[int]
    count: int
    queued: int
    gpu: bool

    def graph(self, contestant: Contestant, number: int, size: int, batch: int) -> Graph:
        """The prompt of a number; our loader has the demo built in, the stock loaders read it from files."""
        files = {} if self.demo and contestant.nodes != STOCK else self.files_of(contestant)
        return contestant.graph(Request.numbered(number, size, batch), files)

    def files_of(self, contestant: Contestant) -> dict[str, str]:
        return self.files | ({"diffusion_models": contestant.model} if contestant.model else {})

    def rows(self) -> list[tuple[int, int]]:
        """Batch and size of every row, in the order of the run."""
        return list(itertools.product(self.batches, self.sizes))

    def numbers(self, row: int, batch: int) -> range:
        """The timed prompts of a row: of larger batches fewer, but three if so many are asked for.

        No two rows share one, because servers keep the encoded words of earlier prompts.
        """
        first = FIRST_TIMED + row * self.count
        return range(first, first + min(self.count, max(3, self.count // batch)))


def prepare(contestant: Contestant, plan: Plan) -> Path:
    """A base directory of the contestant's own: an empty cache of compiled kernels, links to the weight files."""
    base = plan.work / "".join(letter if letter.isalnum() else "-" for letter in contestant.name)
    (base / "custom_nodes").mkdir(parents=True)
    if contestant.nodes != STOCK:
        pack_link.ensure(base / "custom_nodes", plan.pack)
    for kind, name in plan.files_of(contestant).items():
        link = (
            base / "models" / kind / name
        )  # of the file alone, so that what is kept beside it is the contestant's own
        link.parent.mkdir(parents=True)
        made = plan.work / kind / name
        link.symlink_to(made if contestant.model == name else plan.models / kind / name)
    return base


def compiled(base: Path) -> int:
    """Kernels that Triton compiled for a GPU and kept on disk, in all starts so far."""
    return sum(1 for _ in (base / TRITON).rglob("*.cubin"))


@contextlib.contextmanager
def serving(contestant: Contestant, plan: Plan, base: Path) -> Iterator[tuple[Server, MemoryLog]]:
    """Start the contestant's server in its base directory; end it on leaving. Returned before it answers."""
    environment = dict(os.environ) | {"TRITON_CACHE_DIR": str(base / TRITON)}
    if contestant.nodes == STOCK and plan.gpu:
        # Every server that we start has --disable-cuda-malloc, for our CUDA graphs. The host's default on an NVIDIA GPU
        # is the opposite, and this is how it sets it; beyond that, only offload without dynamic memory asks the option.
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "backend:cudaMallocAsync"
    arguments = [
        "--base-directory", base, "--database-url", f"sqlite:///{base / 'comfyui.db'}", "--disable-api-nodes",
        *([] if plan.gpu else ["--cpu"]), *contestant.options,
    ]  # fmt: skip
    log = base / "server.log"
    with (
        Server(Path(sys.executable), plan.tree, arguments, "127.0.0.1", free_port(), environment, log) as server,
        MemoryLog(server.process.pid) as memory,
    ):
        yield server, memory


async def draw_reference(contestant: Contestant, plan: Plan) -> tuple[Gate, dict]:
    """The gate with the pictures of every size, and the server's account of itself. Raises one of BREAKDOWNS."""
    with serving(contestant, plan, prepare(contestant, plan)) as (server, _):
        server.wait_until_ready()
        async with Client.connected(server.url) as client:

            async def draw(number: int, size: int) -> np.ndarray:
                _, images = await client.timed(plan.graph(contestant, number, size, 1))
                return await client.picture(images[0])

            exact = {size: await draw(GATE_PROMPT, size) for size in plan.sizes}
            smallest = min(exact)
            gate = Gate(exact, distance(await draw(OTHER_PROMPT, smallest), exact[smallest]))
            return gate, await client.stats()


async def measure(contestant: Contestant, plan: Plan, gate: Gate) -> dict:
    """Everything about one contestant. What it cannot do is said under "failed", in its rows where one fails.

    Ours start twice. The second start is the one that is measured, as every later one will be like it: it finds what
    the first, under "first_start" with no more than its first picture, has compiled and quantised.
    """
    if contestant.needs_gpu and not plan.gpu:
        return {"skipped": "there is no GPU"}
    report, base = {}, prepare(contestant, plan)
    if contestant.nodes == OURS:
        picture = dataclasses.replace(plan, sizes=plan.sizes[:1], batches=plan.batches[:1], count=0, queued=0)
        report["first_start"] = await _measure_start(contestant, picture, gate, base)
        if "first_image_s" not in report["first_start"]:
            return report
    return report | await _measure_start(contestant, plan, gate, base)


async def _measure_start(contestant: Contestant, plan: Plan, gate: Gate, base: Path) -> dict:
    """A server from start to end: seconds until it answers and then to its first picture, and the rows."""
    report = {"rows": []}
    with serving(contestant, plan, base) as (server, memory):
        try:
            server.wait_until_ready()
            report["start_s"] = memory.now()
            async with Client.connected(server.url) as client:
                await _measure_rows(report, contestant, plan, gate, client, memory, base)
        except BREAKDOWNS as error:  # the server has gone: what was measured before stays
            report["failed"] = _told(error, plan)
            print(server.log_tail(), file=sys.stderr)
        report["gpu_memory_by"] = memory.gpu_by
    return report


async def _measure_rows(
    report: dict, contestant: Contestant, plan: Plan, gate: Gate, client: Client, memory: MemoryLog, base: Path
) -> None:
    before = compiled(base)
    for index, (batch, size) in enumerate(plan.rows()):
        row = {"size": size, "batch": batch}
        report["rows"].append(row)
        since = memory.now()
        try:
            await _measure_row(row, plan.numbers(index, batch), contestant, plan, gate, client)
        except BREAKDOWNS as error:
            row["failed"] = _told(error, plan)
            if not isinstance(error, PromptFailed):
                raise
        finally:
            row |= memory.peaks(since)
        if index == 0:
            report["memory"] = memory.series()
            if "failed" in row:  # it could not load the models: every other row would say the same
                return
            if row["gate"]:
                report |= {"first_image_s": row["warm_up_s"], "compiled": compiled(base) - before}
                report["queue"] = await _measure_queue(contestant, plan, client)


async def _measure_row(
    row: dict, numbers: range, contestant: Contestant, plan: Plan, gate: Gate, client: Client
) -> None:
    """The gate's prompt, which warms the size up, and only if its picture is right the timed ones."""

    def graph(number: int) -> Graph:
        return plan.graph(contestant, number, row["size"], row["batch"])

    seconds, images = await client.timed(graph(GATE_PROMPT))
    verdict = gate.judge(contestant.precision, contestant.yardstick, await client.picture(images[0]))
    row |= {"error": verdict.error, "bound": verdict.bound, "gate": verdict.held}
    if not verdict.held:
        return
    row["warm_up_s"] = seconds
    if numbers:
        row["times_s"] = [(await client.timed(graph(number)))[0] for number in numbers]
        row |= zip(("p20_s", "p50_s", "p80_s"), quantiles(row["times_s"]), strict=True)


async def _measure_queue(contestant: Contestant, plan: Plan, client: Client) -> dict | None:
    """Prompts of the first size and batch posted at once: when each was in the history, and the rate."""
    if not plan.queued:
        return None
    first = plan.numbers(len(plan.rows()), 1).start
    numbers = range(first, first + plan.queued)
    graphs = [plan.graph(contestant, number, plan.sizes[0], plan.batches[0]) for number in numbers]
    start = time.perf_counter()
    ends = []
    for prompt_id in [await client.post(graph) for graph in graphs]:
        await client.finished(prompt_id)
        ends.append(time.perf_counter() - start)
    return {"ends_s": ends, "images_per_s": plan.queued * plan.batches[0] / ends[-1]}


def versions(stats: dict, pack: str) -> dict[str, str | None]:
    """stats: the answer of /system_stats."""
    system = stats["system"]
    return {
        "python": system["python_version"].split()[0],
        "torch": system["pytorch_version"],
        "triton": version("triton"),
        "comfyui": system["comfyui_version"],
        "pack": pack,
    }


def _told(error: Exception, plan: Plan) -> str:
    """An error's first line without the folders of this machine."""
    text = (error.reason if isinstance(error, LauncherError) else str(error)) or type(error).__name__
    for folder in (plan.work, plan.models, plan.models.resolve()):
        text = text.replace(str(folder), "…")
    return text.partition("\n")[0][:300]
