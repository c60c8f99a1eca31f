"""INT4 kernels on a GPU: correctness first, then medians against torch's bf16 linear and comfy-kitchen's W4A8.

Run on a machine with an NVIDIA GPU: python benchmarks/kernels_int4.py [--sweep] [--out FILE.json]
Times are those of a replayed CUDA graph that goes through copies of a weight, together larger than the L2 cache, so
that every call reads its weight from memory. --sweep tries launch shapes for few rows next to those that the pack
takes, on every weight. Processes of their own compile and check them before any is timed.
"""

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.conditions import gpu_conditions
from kernels import (
    fp8,
    hadamard,
    int4,
    int4_few_rows_triton,
    int4_lanes_triton,
    int4_tiles_triton,
)

SHAPES = [(11520, 3840), (3840, 3840), (10240, 3840), (3840, 10240)]  # (N, K) of the transformer
SHAPES += [(9728, 2560), (2560, 9728), (6144, 2560), (4096, 2560), (1024, 2560), (2560, 4096)]  # of the text encoder
SWEPT = [(11520, 3840), (3840, 3840), (20480, 3840), (3840, 10240)]
SWEPT += [(19456, 2560), (2560, 9728), (6144, 2560), (2560, 4096)]
ROWS = (1, 8, 16, 32, 64)
TOKENS = 4224
COLD = 256 * 2**20  # bytes of weights that calls go through: five times the L2 cache of an H100
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
FEW_ROWS = {
    "chosen": int4_few_rows_triton.linear,
    "lanes": int4_lanes_triton.linear,
    "tiles": int4_tiles_triton.linear,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="only find the fastest launch shapes for few rows")
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU")
    torch.manual_seed(0)
    report = gpu_conditions()
    with torch.inference_mode():
        if arguments.sweep:
            report["sweep"] = sweep()
        else:
            report |= {"gate": gate(), "few rows": few_rows(), "expansion": expansion()}
            if fp8.supported("cuda") is None:
                report["many rows"] = many_rows()
            report["quantisation"] = quantisation()
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def gate() -> list[dict]:
    """Every kernel against the reference on fresh numbers; leaves the program where one is wrong."""
    rows = []

    def require(name: str, found: float, allowed: float) -> None:
        rows.append({"name": name, "error": found, "allowed": allowed})
        print(f"{name:28} {found:9.2e}, allowed {allowed:.2e}")
        if not found <= allowed:  # NaN fails as well
            sys.exit(f"{name} is wrong: no times are reported")

    dense = torch.randn(2560, 3840, device="cuda", dtype=BF16) * 0.02
    weight = int4.quantise(dense, rotate=False)
    searched = int4.quantise(dense, rotate=False, backend="torch")
    require("search", int4.relative_error(dense, weight), 1.001 * int4.relative_error(dense, searched))
    for dtype in (FP8, BF16, torch.float16):
        expected = int4.expand(weight, dtype, backend="torch")
        require(f"expand {dtype}", (int4.expand(weight, dtype).float() != expected.float()).sum().item(), 0)
    for dtype, count in itertools.product((BF16, torch.float16), (1, 8, 16, 17, 64, 128)):
        found, allowed = product_error(int4_few_rows_triton.linear, weight, count, dtype)
        require(f"{count} rows {dtype}", found, allowed)
    if fp8.supported("cuda") is None:
        x = torch.randn(333, 3840, device="cuda", dtype=BF16)
        codes, scales = fp8.quantise_rows(x)
        exact = (codes.double() * scales) @ int4.expand(weight, torch.float32).double().T
        require("linear_fp8", error(int4.linear_fp8(x, weight), exact), 4 * error(exact.to(BF16), exact))
    return rows


def product_error(product, weight: int4.Int4Weight, rows: int, dtype: torch.dtype) -> tuple[float, float]:
    """The error of a product of few rows, and the one allowed: twice that of torch's in the same dtype.

    The product runs in a graph, as where it is timed: there it may start while the kernel before it ends, which first
    writes x and then is the same product.
    """
    given = torch.randn(rows, weight.shape[1], device="cuda", dtype=dtype)
    arguments = weight.codes, weight.groups, weight.scales, None, None
    product(given, *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = given * 1
        ours = [product(x, *arguments) for _ in range(2)]
    graph.replay()
    exact = given.double() @ int4.expand(weight, torch.float32).double().T
    allowed = 2 * error(F.linear(given, int4.expand(weight, dtype)), exact)
    return max(error(each, exact) for each in ours), allowed


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


def table(title: str, rows) -> list[dict]:
    """Prints each row as it comes, below the names of the first one's columns."""
    print(f"\n{title}")
    kept = []
    for row in rows:
        if not kept:
            print(" ".join(f"{name:>9}" for name in row))
        kept.append(row)
        cells = (f"{value:9.4g}" if isinstance(value, float) else f"{value!s:>9}" for value in row.values())
        print(" ".join(cells), flush=True)
    return kept


def few_rows() -> list[dict]:
    def rows_of_all():
        for outputs, columns in SHAPES:
            copies, dense = pair(outputs, columns)
            for rows in ROWS:
                x = torch.randn(rows, columns, device="cuda", dtype=BF16)
                plain = microseconds(lambda w, x=x: F.linear(x, w), dense)
                ours = microseconds(lambda w, x=x: few_rows_linear("chosen", {}, x, w), copies)
                figures = {"bf16": plain, "int4": ours, "speed-up": plain / ours, "TB/s": copies[0].nbytes / ours / 1e6}
                yield {"N": outputs, "K": columns, "M": rows, **figures}

    return table("linear of few rows, microseconds", rows_of_all())


def few_rows_linear(kernel: str, shape: dict, x: torch.Tensor, w: int4.Int4Weight) -> torch.Tensor:
    return FEW_ROWS[kernel](x, w.codes, w.groups, w.scales, None, None, **shape)


def sweep() -> list[dict]:
    """For each weight and number of rows the times of the launch shape that the pack takes and of those next to it."""
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    cases = {
        (weight, rows): list(launch_shapes(*weight, rows, multiprocessors))
        for weight, rows in itertools.product(SWEPT, ROWS)
    }
    kinds = []
    for (_, rows), trials in cases.items():
        kinds += [(rows, *trial) for trial in trials if (rows, *trial) not in kinds]
    with ProcessPoolExecutor(14, multiprocessing.get_context("spawn")) as pool:
        fits = list(pool.map(is_right, *zip(*kinds, strict=True)))
    right = [kind for kind, kept in zip(kinds, fits, strict=True) if kept]
    if any((rows, *trials[0]) not in right for (_, rows), trials in cases.items()):
        sys.exit("a shape that the pack takes is wrong: no times are reported")
    found = []
    for outputs, columns in SWEPT:
        copies, dense = pair(outputs, columns)
        for rows in ROWS:
            x = torch.randn(rows, columns, device="cuda", dtype=BF16)
            plain = microseconds(lambda w, x=x: F.linear(x, w), dense)
            times = []
            for kernel, shape in cases[(outputs, columns), rows]:
                if (rows, kernel, shape) in right:
                    call = partial(few_rows_linear, kernel, shape, x)
                    times.append({"us": microseconds(call, copies, repeats=5), "kernel": kernel, **shape})
            chosen = times[0]["us"]
            times.sort(key=lambda trial: trial["us"])
            print(f"\nN={outputs} K={columns} M={rows} bf16 {plain:.1f} chosen {chosen:.1f} best {times[0]['us']:.1f}")
            for trial in times:
                print(f"    {trial['us']:5.1f}", *(f"{k}={v}" for k, v in trial.items() if k != "us"), flush=True)
            found.append({"N": outputs, "K": columns, "M": rows, "bf16": plain, "chosen": chosen, "times": times})
    return found


def launch_shapes(outputs: int, columns: int, rows: int, multiprocessors: int):
    """(kernel, shape) to try for a product: what the pack takes, then changes of one parameter of it."""
    if rows <= int4_few_rows_triton.MOST_IN_LANES:
        kernel, shape = "lanes", int4_few_rows_triton.lanes_shape(outputs, columns, multiprocessors)
        others = [{"warps": 2}]
    else:
        kernel, shape = "tiles", int4_few_rows_triton.tiles_shape(rows, outputs, columns, multiprocessors)
        others = [{"warps": 12 - shape["warps"]}, {"arranged": not shape["arranged"]}, {"slices": 2 * shape["slices"]}]
    yield kernel, shape
    others += [{"slices": slices} for slices in (shape["slices"] - 1, shape["slices"] + 1) if slices > 0]
    for other in others:
        yield kernel, {**shape, **other}


def is_right(rows: int, kernel: str, shape: dict) -> bool:
    """Whether a launch shape fits the GPU and computes the product; no other is timed."""
    torch.manual_seed(rows)
    with torch.inference_mode():
        weight = int4.quantise(torch.randn(1008, 2560, device="cuda", dtype=BF16) * 0.02, rotate=False)
        try:
            found, allowed = product_error(partial(FEW_ROWS[kernel], **shape), weight, rows, BF16)
        except triton.runtime.errors.OutOfResources as reason:
            print(f"{kernel} {shape}, {rows} rows does not fit: {reason}")
            return False
    if not found <= allowed:
        print(f"WRONG: {kernel} {shape}, {rows} rows: {found:.2e}, allowed {allowed:.2e}")
    return found <= allowed


def expansion() -> list[dict]:
    def rows_of_all():
        for outputs, columns in SHAPES[:2]:
            copies, _ = pair(outputs, columns)
            for name, dtype in {"fp8": FP8, "bf16": BF16}.items():
                out = torch.empty(outputs, columns, dtype=dtype, device="cuda")
                time_of = microseconds(lambda w, out=out: int4.expand(w, out.dtype, out), copies)
                moved = copies[0].nbytes + out.nbytes
                yield {"N": outputs, "K": columns, "to": name, "us": time_of, "TB/s": moved / time_of / 1e6}

    return table("expand and its memory traffic", rows_of_all())


def many_rows() -> list[dict]:
    """int4-fp8 whole and in parts; comfy-kitchen's W4A8 whole, whose weights are always rotated, and both errors."""
    kitchen = importlib.util.find_spec("comfy_kitchen") is not None
    beside = f"comfy-kitchen {version('comfy-kitchen')}'s W4A8" if kitchen else "comfy-kitchen is not installed"
    rows = (many_rows_of(outputs, columns, kitchen) for outputs, columns in SHAPES[:4])
    return table(f"linear of {TOKENS} rows, microseconds; {beside}", rows)


def many_rows_of(outputs: int, columns: int, kitchen: bool) -> dict:
    copies, dense = (each[:6] for each in pair(outputs, columns))
    turned = [int4.Int4Weight(w.codes, w.groups, w.scales, rotated=True) for w in copies]
    x = torch.randn(TOKENS, columns, device="cuda", dtype=BF16)
    space = torch.empty(outputs, columns, dtype=FP8, device="cuda")
    x_fp8, x_scales = fp8.quantise_rows(x)
    w_fp8 = int4.expand(copies[0], FP8)
    whole = partial(int4.linear_fp8, x, workspace=space)
    times = {
        "bf16": microseconds(lambda w: F.linear(x, w), dense),
        "int4-fp8": microseconds(whole, copies),
        "rotated": microseconds(whole, turned),
        "rows": microseconds(lambda w: fp8.quantise_rows(x, (x_fp8, x_scales)), copies),
        "rot+rows": microseconds(lambda w: hadamard.rotate_quantise_rows(x), copies),
        "expand": microseconds(lambda w: int4.expand(w, FP8, space), copies),
        "product": microseconds(lambda w: fp8.linear(x_fp8, x_scales, w_fp8, w.scales, None, BF16), copies),
        "int4": microseconds(partial(int4.linear, x), copies),
    }
    found = {"N": outputs, "K": columns, **times, "/bf16": times["bf16"] / times["int4-fp8"]}
    if kitchen:
        exact = F.linear(x.float(), dense[0].float())
        product, parts = kitchen_linear(x, dense[0])
        found["W4A8"] = microseconds(
            product, [[part if part is None else part.clone() for part in parts] for _ in copies]
        )
        found["/W4A8"] = found["W4A8"] / times["int4-fp8"]
        found["W4A8 err"], found["our err"] = error(product(parts), exact), error(whole(copies[0]), exact)
    return found


def kitchen_linear(x: torch.Tensor, weight: torch.Tensor):
    """comfy-kitchen's linear of x as a function of a weight's parts, and these."""
    from comfy_kitchen import quantize_w4a8_int8_weight, w4a8_int8_linear

    def product(parts) -> torch.Tensor:
        codes, group_scales, row_scales, correction, codebook = parts
        return w4a8_int8_linear(x, codes, group_scales, row_scales, codebook=codebook, correction=correction)

    return product, quantize_w4a8_int8_weight(weight)


def quantisation() -> list[dict]:
    dense = torch.randn(2**29 // 3840, 3840, device="cuda", dtype=BF16)
    int4.quantise(dense[:4096])

    def rows_of_all():
        for rotate in (False, True, None):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            int4.quantise(dense, rotate)
            end.record()
            end.synchronize()
            yield {"rotate": str(rotate), "ms": start.elapsed_time(end)}

    return table(f"quantise {dense.nbytes / 1e9:.2f} GB of bf16", rows_of_all())


if __name__ == "__main__":
    main()
