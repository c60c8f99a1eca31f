"""INT4 and FP8 kernels on a GPU: correctness first, then medians against torch's bf16 linear.

Run: python benchmarks/kernels_int4.py [--sweep]
Times are those of a replayed CUDA graph that goes through copies of a weight, together larger than the L2 cache, so
that every call reads its weight from memory. --sweep instead tries every candidate for the product of few rows in many
launch shapes: first on SCREEN, then the fastest ones on every weight. Processes of their own compile and check them.
"""

import argparse
import itertools
import multiprocessing
import statistics
import sys
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import triton  # noqa: E402

from zimage_turbo.kernels import fp8, hadamard, int4, int4_few_rows_triton, int4_reference  # noqa: E402

SHAPES = [(11520, 3840), (3840, 3840), (10240, 3840), (3840, 10240), (9728, 2560), (2560, 9728), (6144, 2560)]  # (N, K)
ROWS = [1, 16, 64, 256]
TOKENS = 4224
SCREEN = [(10240, 3840), (3840, 3840)]  # the sweep's first round
FINALISTS = 6
PROGRAMS = (3, 4, 5, 6, 8)
COLD = 256 * 2**20  # bytes of weights that calls go through: five times the L2 cache of an H100
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="only find the fastest products of few rows")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(0), "torch", torch.__version__, "triton", triton.__version__)
    with torch.inference_mode():
        if arguments.sweep:
            sweep()
            return
        check()
        few_rows()
        expansion()
        if fp8.supported("cuda") is None:
            many_rows()
        quantisation()


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def require(name: str, found: float, allowed: float) -> None:
    print(f"check {name}: {found:.2e}, allowed {allowed:.2e}")
    if not found <= allowed:  # NaN fails as well
        sys.exit(f"{name} is wrong: no times are reported")


def check() -> None:
    """Every kernel against the reference on fresh numbers."""
    dense = torch.randn(2560, 3840, device="cuda", dtype=BF16) * 0.02
    weight = int4.quantise(dense, rotate=False)
    parts = weight.codes, weight.groups, weight.scales
    searched = int4.Int4Weight(*int4_reference.search(dense.float(), 0), rotated=False)
    require("search", int4.relative_error(dense, weight), 1.001 * int4.relative_error(dense, searched))
    for dtype in (FP8, BF16, torch.float16):
        expected = int4_reference.expand(*parts, torch.empty(weight.shape, dtype=dtype, device="cuda"))
        require(f"expand {dtype}", (int4.expand(weight, dtype).float() != expected.float()).sum().item(), 0)
    for dtype in (BF16, torch.float16):
        plain_weight = int4.expand(weight, dtype)
        for rows in (1, 17, 64, 200):
            x = torch.randn(rows, 3840, device="cuda", dtype=dtype)
            exact = x.double() @ int4.expand(weight, torch.float32).double().T
            allowed = 2 * error(F.linear(x, plain_weight), exact)
            ours = int4_few_rows_triton.linear(x, *parts, None)
            require(f"linear {rows} rows, {dtype}", error(ours, exact), allowed)
    if fp8.supported("cuda") is None:
        x = torch.randn(333, 3840, device="cuda", dtype=BF16)
        codes, scales = fp8.quantise_rows(x)
        exact = (codes.double() * scales) @ int4.expand(weight, torch.float32).double().T
        require("linear_fp8", error(int4.linear_fp8(x, weight), exact), 4 * error(exact.to(BF16), exact))


def microseconds(call, weights: list, repeats: int = 15) -> float:
    """Median time of call(weight), from graphs that hold one call for each weight."""
    for weight in weights:
        call(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            call(weight)
    times = []
    for _ in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(weights))
    return statistics.median(times[3:])


def pair(outputs: int, columns: int) -> tuple[list, list]:
    """One weight in INT4 and in bf16, each again and again up to COLD bytes."""
    dense = torch.randn(outputs, columns, device="cuda", dtype=BF16) * 0.02
    weight = int4.quantise(dense, rotate=False)
    copies = [
        int4.Int4Weight(weight.codes.clone(), weight.groups.clone(), weight.scales.clone(), rotated=False)
        for _ in range(-(-COLD // weight.nbytes))
    ]
    return copies, [dense.clone() for _ in range(-(-COLD // dense.nbytes))]


def few_rows() -> None:
    print("\nlinear of few rows, microseconds")
    print(f"{'N':>6} {'K':>6} {'M':>4} {'bf16':>7} {'fused':>7} {'ratio':>6} {'TB/s':>5} {'expand':>7}")
    for outputs, columns in SHAPES:
        copies, dense = pair(outputs, columns)
        for rows in ROWS:
            print(f"{outputs:6} {columns:6} {rows:4} {few_rows_of(rows, copies, dense)}", flush=True)


def few_rows_of(rows: int, copies: list, dense: list) -> str:
    x = torch.randn(rows, copies[0].shape[1], device="cuda", dtype=BF16)
    plain = microseconds(lambda w: F.linear(x, w), dense)
    expanded = microseconds(lambda w: F.linear(x, int4.expand(w, BF16)), copies)
    fused = microseconds(lambda w: fused_linear(x, w), copies)
    return f"{plain:7.1f} {fused:7.1f} {plain / fused:6.2f} {copies[0].nbytes / fused / 1e6:5.2f} {expanded:7.1f}"


def fused_linear(x: torch.Tensor, w: int4.Int4Weight, **shape) -> torch.Tensor:
    return int4_few_rows_triton.linear(x, w.codes, w.groups, w.scales, None, **shape)


def sweep() -> None:
    began = time.perf_counter()
    with ProcessPoolExecutor(14, multiprocessing.get_context("spawn")) as pool:
        screened = {rows: checked(pool, rows, list(kernels(rows))) for rows in (16, 64)}
        print(f"{time.perf_counter() - began:.0f} s: first round", flush=True)
        best = {rows: screen(rows, screened[rows]) for rows in screened}
        for rows, shapes in best.items():
            trials = [{**shape, "overlap": flag} for shape in shapes for flag in (False, True)]
            best[rows] = checked(pool, rows, [{"candidate": "pairs"}, *trials])
    print(f"{time.perf_counter() - began:.0f} s: second round")
    for outputs, columns in SHAPES:
        copies, dense = pair(outputs, columns)
        for rows in (1, 16, 64):
            x = torch.randn(rows, columns, device="cuda", dtype=BF16)
            plain = microseconds(lambda w, x=x: F.linear(x, w), dense)
            found = verdict(x, copies, best[max(16, rows)], plain)
            print(f"{outputs} {columns} M={rows} bf16 {plain:.1f} {found}", flush=True)
    print(f"{time.perf_counter() - began:.0f} s")


def kernels(rows: int):
    """Launch parameters that are compiled in, for 16 or 64 rows."""
    blocks = [(4, 1), (8, 1), (4, 2)] if rows == 16 else [(4, 1), (8, 1), (16, 1), (8, 2)]
    stages = (3, 4) if rows == 16 else (2, 3)
    for candidate, (warps, tiles), unroll, depth in itertools.product(("load", "shuffle"), blocks, (1, 2), stages):
        yield {"candidate": candidate, "warps": warps, "tiles": tiles, "unroll": unroll, "stages": depth}


def checked(pool: ProcessPoolExecutor, rows: int, shapes: list) -> list:
    """Those of the launch shapes that fit the GPU and compute the product; no other is timed."""
    kept = []
    for shape, (ours, allowed) in zip(shapes, pool.map(compiled_error, itertools.repeat(rows), shapes), strict=True):
        if ours is None:
            print("does not fit:", named(shape))
        elif not ours <= allowed:
            print(f"WRONG: {named(shape)}, {rows} rows: {ours:.2e}, allowed {allowed:.2e}")
        else:
            kept.append(shape)
    print(f"{len(kept)} of {len(shapes)} launch shapes for {rows} rows fit and are right", flush=True)
    if not kept:
        sys.exit("no times are reported")
    return kept


def compiled_error(rows: int, shape: dict) -> tuple[float | None, float]:
    """The error on a small weight, None if the GPU has too little shared memory, and that of bf16, twice."""
    torch.manual_seed(rows)
    with torch.inference_mode():
        weight = int4.quantise(torch.randn(1008, 2560, device="cuda", dtype=BF16) * 0.02, rotate=False)
        x = torch.randn(rows, 2560, device="cuda", dtype=BF16)
        exact = x.double() @ int4.expand(weight, torch.float32).double().T
        allowed = 2 * error(F.linear(x, int4.expand(weight, BF16)), exact)
        try:
            return error(fused_linear(x, weight, **shape), exact), allowed
        except triton.runtime.errors.OutOfResources:
            return None, allowed


def screen(rows: int, shapes: list) -> list:
    """The FINALISTS fastest on SCREEN, each by its best number of programs; at least one of each candidate."""
    score = [0.0] * len(shapes)
    for outputs, columns in SCREEN:
        copies, _ = pair(outputs, columns)
        x = torch.randn(rows, columns, device="cuda", dtype=BF16)
        times = [fastest(x, copies, shape)[0] for shape in shapes]
        score = [total + time / min(times) for total, time in zip(score, times, strict=True)]
    ranked = sorted(zip(score, map(named, shapes), shapes, strict=True))
    print(f"{rows} rows, times over the best of each weight:", *(f"{s / len(SCREEN):.2f} ({n})" for s, n, _ in ranked))
    chosen = [shape for _, _, shape in ranked]
    firsts = [shapes[0] for name in ("load", "shuffle") if (shapes := [s for s in chosen if s["candidate"] == name])]
    return firsts + [shape for shape in chosen if shape not in firsts][: FINALISTS - 2]


def fastest(x: torch.Tensor, copies: list, shape: dict) -> tuple[float, dict]:
    """Microseconds and launch shape with the best number of programs."""
    if shape["candidate"] == "pairs":
        return microseconds(lambda w: fused_linear(x, w, **shape), copies, repeats=5), shape
    trials = [{**shape, "programs": programs} for programs in PROGRAMS]
    times = [microseconds(lambda w, t=trial: fused_linear(x, w, **t), copies, repeats=5) for trial in trials]
    return min(zip(times, trials, strict=True), key=lambda found: found[0])


def verdict(x: torch.Tensor, copies: list, shapes: list, plain: float) -> str:
    """The best launch shape, and the best times of its alternatives."""
    found = sorted((fastest(x, copies, shape) for shape in shapes), key=lambda each: each[0])
    best, shape = found[0]
    times = {
        name: min((t for t, s in found if s["candidate"] == name), default=float("nan"))
        for name in int4_few_rows_triton.CANDIDATES
    }
    times["no overlap"] = min(t for t, s in found if not s.get("overlap"))
    others = " ".join(f"{name} {time:.1f}" for name, time in times.items())
    return f"| {named(shape)} {best:.1f} us {copies[0].nbytes / best / 1e6:.2f} TB/s {plain / best:.2f}x | {others}"


def named(shape: dict) -> str:
    return " ".join(str(value) if name == "candidate" else f"{name}={value:d}" for name, value in shape.items())


def expansion() -> None:
    print(f"\nexpand and its memory traffic\n{'N':>6} {'K':>6} {'to':>5} {'us':>7} {'TB/s':>5}")
    for outputs, columns in SHAPES[:2]:
        copies, _ = pair(outputs, columns)
        for name, dtype in {"fp8": FP8, "bf16": BF16}.items():
            print(f"{outputs:6} {columns:6} {name:>5} {expansion_of(copies, dtype)}", flush=True)


def expansion_of(copies: list, dtype: torch.dtype) -> str:
    out = torch.empty(copies[0].shape, dtype=dtype, device="cuda")
    time = microseconds(lambda w: int4.expand(w, dtype, out), copies)
    return f"{time:7.1f} {(copies[0].nbytes + out.nbytes) / time / 1e6:5.2f}"


def many_rows() -> None:
    print(
        f"\nlinear of {TOKENS} rows, microseconds; the parts of int4-fp8; rotation, alone and with rows; int4 in 16 bit"
    )
    names = ("N", "K", "bf16", "int4-fp8", "ratio", "rows", "expand", "product", "rotate", "rot+rows", "int4")
    print(" ".join(f"{name:>8}" for name in names))
    for outputs, columns in SHAPES[:4]:
        print(f"{outputs:8} {columns:8} {many_rows_of(*pair(outputs, columns))}", flush=True)


def many_rows_of(copies: list, dense: list) -> str:
    copies, dense = copies[:6], dense[:6]
    outputs, columns = copies[0].shape
    x = torch.randn(TOKENS, columns, device="cuda", dtype=BF16)
    space = torch.empty(outputs, columns, dtype=FP8, device="cuda")
    x_fp8, x_scales = fp8.quantise_rows(x)
    w_fp8 = int4.expand(copies[0], FP8)
    plain = microseconds(lambda w: F.linear(x, w), dense)
    ours = microseconds(lambda w: int4.linear_fp8(x, w, workspace=space), copies)
    parts = (
        microseconds(lambda w: fp8.quantise_rows(x, (x_fp8, x_scales)), copies),
        microseconds(lambda w: int4.expand(w, FP8, space), copies),
        microseconds(lambda w: fp8.linear(x_fp8, x_scales, w_fp8, w.scales, None, BF16), copies),
        microseconds(lambda w: hadamard.rotate(x), copies),
        microseconds(lambda w: hadamard.rotate_quantise_rows(x), copies),
        microseconds(lambda w: int4.linear(x, w), copies),
    )
    return f"{plain:8.1f} {ours:8.1f} {plain / ours:8.2f} " + " ".join(f"{part:8.1f}" for part in parts)


def quantisation() -> None:
    dense = torch.randn(2**29 // 3840, 3840, device="cuda", dtype=BF16)
    int4.quantise(dense[:4096])
    for rotate in (False, True, None):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        int4.quantise(dense, rotate)
        end.record()
        end.synchronize()
        print(f"\nquantise {dense.nbytes / 1e9:.2f} GB of bf16, rotate={rotate}: {start.elapsed_time(end):.0f} ms")


if __name__ == "__main__":
    main()
