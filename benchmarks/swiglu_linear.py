"""The gate of a feed-forward in one kernel beside two library products and the gate's own kernel, on a hot GPU.

Run on a machine with a Hopper GPU: python benchmarks/swiglu_linear.py [--rows 1088 4160 16448] [--out FILE.json]

Such products draw as much power as the board has, and a GPU that has just rested is faster than one at work. So both
forms are timed in turns, after as long at work as clocks take to settle; what is reported are medians of their turns.
Nothing is timed before its result has been held against fp32.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn.functional import linear, silu

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.conditions import gpu_conditions
from kernels import fp8, swiglu_linear

WIDTH, HIDDEN, LAYERS = 3840, 10240, 4  # of Z-Image; weights that calls go through, larger than the L2 cache
FORMS = ("fused", "apart")
ALLOWED = {"16-bit": 0.004, "fp8": 0.04}  # relative error: what rounds to bf16, and to FP8 rows
WARM, TURN, TURNS = 1.5, 0.2, 5  # seconds, seconds, of each form


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1088, 4160, 16448], help="tokens of a picture")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU")
    torch.manual_seed(0)
    report = {**gpu_conditions(), "rows": []}
    if torch.cuda.get_device_capability()[0] == 9:
        with torch.inference_mode():
            report["rows"] += measured_rows(arguments.rows)
    else:
        print("no rows: the kernel is for GPUs of compute capability 9.0 (Hopper)")
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measured_rows(counts: list[int]) -> Iterator[dict]:
    weights = [[tensor(HIDDEN, WIDTH, spread=0.02) for _ in range(2)] for _ in range(LAYERS)]
    for rows in counts:
        x = tensor(rows, WIDTH)
        yield measured("16-bit", x, weights)
        yield measured("fp8", x, weights)


def tensor(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * spread).bfloat16()


def measured(kind: str, x: torch.Tensor, weights: list[list[torch.Tensor]]) -> dict:
    """Microseconds of a gate in each form, with the lowest and highest turn, after the gate on its result."""
    if kind == "fp8":
        x, weights = fp8.quantise_rows(x), [[fp8.quantise_weight(weight) for weight in pair] for pair in weights]
        exact = composed(*(codes.float() * scales.view(-1, 1) for codes, scales in (x, *weights[0])))
        op = swiglu_linear.linear_fp8
    else:
        exact, op = composed(x.float(), *(weight.float() for weight in weights[0])), swiglu_linear.linear
    row, graphs = {"what": kind, "tokens": len(exact)}, {}
    for form in FORMS:
        found = op(x, *weights[0], backend=form)
        found = found[0].float() * found[1] if kind == "fp8" else found.float()
        row[f"{form}_error"] = round(((found - exact).norm() / exact.norm()).item(), 5)
        if not row[f"{form}_error"] <= ALLOWED[kind]:  # NaN fails as well
            sys.exit(f"{kind}, {form}: wrong by {row[f'{form}_error']}, no times are reported")
        graphs[form] = captured(functools.partial(op, x, backend=form), weights)
    for form, times in in_turns(graphs).items():
        times = [round(1e6 * seconds / LAYERS, 1) for seconds in times]
        row |= {f"{form}_us": statistics.median(times), f"{form}_range_us": [min(times), max(times)]}
    row["speed-up"] = round(row["apart_us"] / row["fused_us"], 3)
    print(json.dumps(row), flush=True)
    return row


def composed(x: torch.Tensor, gate_weight: torch.Tensor, value_weight: torch.Tensor) -> torch.Tensor:
    return silu(linear(x, gate_weight)) * linear(x, value_weight)


def captured(call: Callable, weights: list[list]) -> torch.cuda.CUDAGraph:
    """A graph of a call with each pair of weights."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for pair in weights:
            call(*pair)
    return graph


def in_turns(graphs: dict[str, torch.cuda.CUDAGraph]) -> dict[str, list[float]]:
    """Seconds of a replay, of each graph in every turn."""
    times = {name: [] for name in graphs}
    at_work(next(iter(graphs.values())), WARM)
    for _ in range(TURNS):
        for name, graph in graphs.items():
            at_work(graph, TURN)
            times[name].append(at_work(graph, TURN))
    return times


def at_work(graph: torch.cuda.CUDAGraph, seconds: float) -> float:
    """Replays for about so long; the mean time of one."""
    start, replays = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            graph.replay()
        replays += 4
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / replays


if __name__ == "__main__":
    main()
