"""What several GPUs give: pictures a second, latency of one picture drawn together, exchange, start and recovery.

Through the group of ranks that the loader's multi-gpu has, in one process that is its coordinator, as ComfyUI's is. One
group on all GPUs serves every row; where a row is of fewer, the first ones are asked and the others idle.
A precision is measured only if its pictures are right: whole pictures that other ranks draw must be those of the first
to the bit, and one evaluation together at most twice as far from fp32 as one GPU's is.
Rows: "images" (denoise and decode; efficiency: the rate, against as many times that of one GPU), "latency" (denoise
alone, and with decode), "exchange" (an evaluation together, against one GPU's time over the number of GPUs; and what it
exchanges by itself), "start", "recovery" (from SIGKILL of a rank to the next picture of each).
Run: ZIMAGE_COMFYUI=<tree> python benchmarks/multi_gpu.py (--models FOLDER | --random-weights FOLDER | --demo)
     [--devices cuda:0,cuda:1] [--gpus 1 2 4 8] [--precision int4-fp8 bf16] [--size 1024 2048 512 1536] [--seconds 480]
     [--out FILE.json]
What weighs most comes first, and the file is written after every row: what --seconds leaves no time for is named in it.
Quantised weights are kept beside the files. Without GPUs, two ranks on the processor show that it runs, no more.
"""

import argparse
import json
import os
import sys
import tempfile
import types
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks import gate, plots, weight_files  # noqa: E402
from zimage_turbo.benchmarks.conditions import conditions  # noqa: E402
from zimage_turbo.benchmarks.contestants import FILES, choice  # noqa: E402
from zimage_turbo.benchmarks.pipeline import register  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402

SIZES = {"gpu": [1024, 2048, 512, 1536], "cpu": [128]}
PRECISIONS = {"gpu": ["int4-fp8", "bf16"], "cpu": ["auto"]}


def main() -> None:
    arguments = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        folder = None if arguments.demo else weight_files.folder(arguments, Path(work))
        host.enter(host.tree(), [])
        report = measured(arguments, folder)
    print("\n".join(table(report)))
    if arguments.out and plots.available():
        plots.write(report, arguments.out)
    gate.insist(report["rows"])


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    weight_files.add_arguments(parser)
    parser.add_argument("--devices", help="of the ranks, with commas; all GPUs, without any cpu,cpu")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8], help="how many draw, of those at hand")
    parser.add_argument("--precision", nargs="+", help="int4-fp8 bf16, without GPUs auto; the first also starts twice")
    parser.add_argument("--size", type=int, nargs="+", help="sides of square pictures; the first for all rows")
    parser.add_argument("--seconds", type=float, default=3600, help="after which no further row is begun")
    parser.add_argument("--out", type=Path, help="JSON file, written after every row; plots are put beside it")
    return parser.parse_args(words)


def measured(arguments: argparse.Namespace, folder: Path | None) -> dict:
    import torch

    from zimage_turbo.benchmarks.group_rows import GroupRows
    from zimage_turbo.engine import catalogue, devices

    files = {}
    if folder:
        register(folder, FILES)
        files = weight_files.names(folder)
    ranks = tuple(arguments.devices.split(",")) if arguments.devices else devices.ranks(0)
    kind = "cpu" if ranks[0] == devices.CPU else "gpu"
    report = conditions() | described(ranks) | {"weights": weight_files.kind(arguments), "seconds": arguments.seconds}
    report |= {"rows": [], "left_out": []}

    def save() -> None:
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(report) + "\n", encoding="utf-8")

    def keep(row: dict) -> None:
        row = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}
        report["rows"].append(row)
        print(json.dumps({name: value for name, value in row.items() if not name.endswith("times_s")}), flush=True)
        save()

    counts = sorted({1, *(count for count in arguments.gpus if count <= len(ranks))})
    with torch.inference_mode(), GroupRows(catalogue.resolve(**choice(files)), ranks, counts, keep) as rows:
        steps = rows.steps(arguments.precision or PRECISIONS[kind], arguments.size or SIZES[kind])
        report["left_out"] = rows.run(steps, arguments.seconds)
        save()
    return report


def described(ranks: tuple[str, ...]) -> dict:
    """The GPUs of the ranks, what links them, and what carries the exchange."""
    import torch

    from zimage_turbo.engine import devices, topology

    about = {"cores": os.cpu_count(), "ranks": list(ranks)}
    if ranks[0] == devices.CPU:
        return about
    linked = topology.read()
    names = [linked.gpus[int(rank.removeprefix("cuda:"))].name for rank in ranks]
    settings = {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "TORCH_NCCL_"))}
    nccl = {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "nccl_settings": settings}
    return about | {"gpus": names, "topology": linked.described()} | nccl


def table(report: dict) -> list[str]:
    """A line a row, without what stands in the file alone."""
    lines = [f"{len(report['ranks'])} ranks, {report['device']}, {report.get('topology', 'no links')}"]
    lines += [line(row) for row in report["rows"]]
    return [*lines, *(f"left out for want of time: {name}" for name in report["left_out"])]


def line(row: dict) -> str:
    head = f"{row['what']:<9} {row['precision']:<9} on {row['gpus']}"
    if row["what"] == "parity":
        return f"{head}  {'right' if row['gate'] else 'WRONG'}: {row['said']}"
    if row["what"] == "images":
        efficiency = f", {100 * row['efficiency']:.1f} % of linear" if "efficiency" in row else ""
        busy = f", busy {row['busy_percent']} %, {row['memory_mib']} MiB" if "busy_percent" in row else ""
        return f"{head}  {row['a_card']} a card: {row['images_per_s']:.3f} a second{efficiency}{busy}"
    if row["what"] == "latency":
        gain = f" ({row['speed_up']:.2f} times)" if "speed_up" in row else ""
        denoise, picture = (f"{1000 * row[name]:.0f} ms" for name in ("denoise_p50_s", "picture_p50_s"))
        return f"{head}  {row['size']:>4}: denoise {denoise}{gain}, with decode {picture}"
    if row["what"] == "exchange":
        alone, together, beyond, exchange = (
            f"{1000 * row[name]:.2f}" for name in ("alone_s", "together_s", "beyond_ideal_s", "exchange_s")
        )
        return f"{head}  {row['size']:>4}: {alone} to {together} ms, {beyond} beyond ideal, exchange alone {exchange}"
    return f"{head}  {row['seconds']:.1f} s: {row['said']}"


if __name__ == "__main__":
    main()
