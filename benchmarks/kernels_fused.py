"""The fused element-wise kernels and attention at Z-Image's sizes, beside eager torch, after a correctness gate.

Run on a machine with an NVIDIA GPU: python benchmarks/kernels_fused.py [--sweep | --rows] [--out FILE.json]

Each figure is of one call inside a CUDA graph that goes round three sets of tensors, so that launches cost nothing and
the caches hold little. TB/s counts every input read once and every output written once. Nothing is timed before every
result has been held against float64.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import layer_norm, linear, rms_norm, silu

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.conditions import gpu_conditions
from kernels import attention, attention_fp8, fp8, modulation, norm, residual, rope, swiglu
from kernels.arguments import FP8, outputs, quantise_rows

TOKENS, WIDTH, HEADS, HEAD_WIDTH, HIDDEN = 4224, 3840, 30, 128, 10240
LAYERS, TIME_WIDTH = 32, 256  # that are modulated; of the noise level's embedding
PRODUCTS = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "w1, w3": (HIDDEN, WIDTH), "w2": (WIDTH, HIDDEN)}
EPS, SETS, REPLAYS = 1e-5, 3, 15
EXACT = 0.01  # relative error of an attention backend that rounds to bf16 only: 0.003 to 0.005
ATTENTION_BLOCKS = [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3)]

ROWS_TOKENS = 4160  # of a picture of 1024x1024 and 64 words
ROW_SPLITS = [(rows, 8, 3) for rows in (1, 2, 4, 8, 11, 16)]  # rows of a program, warps, stages
ROW_SPLITS += [(rows, warps, 3) for warps in (4, 16) for rows in (4, 8, 11, 16)]
ROW_SPLITS += [(rows, 8, stages) for stages in (1, 2, 4) for rows in (4, 8, 11)]


@dataclass
class Case:
    """ours and eager take the tensors that make() gives and return a tuple of tensors, or (codes, row scales)."""

    name: str
    make: Callable[[], tuple]
    ours: Callable
    eager: Callable
    fp8: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    more = parser.add_mutually_exclusive_group()
    more.add_argument(
        "--sweep", action="store_true", help="time our attention with other blocks too, and the parts of its FP8 form"
    )
    more.add_argument(
        "--rows", action="store_true", help="time only the norm behind half a block, with other splits of its rows"
    )
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs an NVIDIA GPU")
    report = gpu_conditions()
    with torch.inference_mode():
        if arguments.rows:
            report["rows"] = row_sweep()
        else:
            report |= {"elementwise": elementwise(), "products": fp8_products(), "attention": attention_backends()}
        if arguments.sweep:
            report["sweep"] = sweep()
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def cases(device, tokens=TOKENS) -> list[Case]:
    """Every fused op with its eager composition, every step of which rounds to bf16 as in the host."""

    def tensor(*shape, spread=1.0, dtype=torch.bfloat16):
        return (torch.randn(shape, device=device) * spread).to(dtype)

    def modulate():
        return tensor(1, tokens, WIDTH, spread=3), 1 + tensor(WIDTH, spread=0.2), tensor(1, WIDTH)

    def halves(dtype=torch.bfloat16):
        x, h = tensor(1, tokens, WIDTH, spread=3, dtype=dtype), tensor(1, tokens, WIDTH, spread=5)
        return x, h, 1 + tensor(WIDTH, spread=0.2), tensor(1, WIDTH), 1 + tensor(WIDTH, spread=0.2), tensor(1, WIDTH)

    def held():
        y, *others = halves()
        weight, scale = 1 + tensor(WIDTH, spread=0.2), tensor(1, WIDTH, spread=0.2)
        return y, 1 + torch.rand(tokens, 1, device=device), weight, scale, *others

    def sums():
        x, _, *vectors = halves()
        row_scales, column_scales = (torch.rand(shape, device=device) * 1e-2 for shape in ((tokens, 1), (WIDTH,)))
        return x, tensor(1, tokens, WIDTH, spread=1e5), *vectors, row_scales, column_scales

    def layers():
        weights = (tensor(4 * WIDTH, TIME_WIDTH, spread=0.05) for _ in range(LAYERS))
        return tensor(1, TIME_WIDTH), *weights, *(tensor(4 * WIDTH) for _ in range(LAYERS))

    def heads():
        phase = torch.randn(tokens, HEAD_WIDTH // 2, device=device) * 9
        weights = (1 + tensor(HEAD_WIDTH, spread=0.2) for _ in range(2))
        return tensor(1, tokens, 3, HEADS, HEAD_WIDTH), *weights, torch.stack((phase.cos(), phase.sin()), -1)

    def gate():
        return tensor(tokens, HIDDEN, spread=2), tensor(tokens, HIDDEN, spread=2)

    def eager_modulate(x, weight, scale):
        return (rms_norm(x, x.shape[-1:], weight, EPS) * (1 + scale.unsqueeze(1)),)

    def eager_residual(x, h, post_weight, gate, next_weight, scale):
        x = x + gate.unsqueeze(1).tanh() * rms_norm(h, h.shape[-1:], post_weight, EPS)
        return x, eager_modulate(x, next_weight.to(x.dtype), scale)[0].to(h.dtype)

    def eager_held(y, rms, weight, scale, *others):
        return eager_residual((y * rms / (weight * (1 + scale.unsqueeze(1)))).to(y.dtype), *others)[1:]

    def eager_sums(x, sums, post_weight, gate, next_weight, scale, row_scales, column_scales):
        h = (sums * row_scales * column_scales).to(sums.dtype)
        return eager_residual(x, h, post_weight, gate, next_weight, scale)

    def eager_layers(x, *parts):
        return (torch.stack([linear(x, *one) for one in zip(parts[:LAYERS], parts[LAYERS:], strict=True)]),)

    def eager_rope(qkv, q_weight, k_weight, table):
        cos, sin = table[:, None].unbind(-1)
        out = []
        for part, weight in enumerate((q_weight, k_weight)):
            x = rms_norm(qkv[:, :, part], qkv.shape[-1:], weight, EPS).to(table.dtype)
            a, b = x[..., 0::2], x[..., 1::2]
            rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
            out.append(rotated.to(qkv.dtype).transpose(1, 2).contiguous())
        return tuple(out)

    def eager_gate(a, b):
        return (silu(a) * b,)

    def eager_layer(x, weight, scale):
        return (layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)),)

    def quantised(eager):
        return lambda *given: (*eager(*given)[:-1], *quantise_rows(eager(*given)[-1]))

    def ours_residual(*given, quantise=False):
        return norm.residual_rms_modulate(*given, EPS, quantise)

    def ours_held(*given):
        return residual.add(residual.Normed(*given[:4]), *given[4:], EPS)[:1]

    def ours_sums(*given, quantise=False):
        return norm.residual_rms_modulate(*given[:6], EPS, quantise, 1.0, *given[6:])

    def ours_layers(x, *parts):
        return (modulation.products(x, parts[:LAYERS], parts[LAYERS:]),)

    return [
        Case("rms_modulate", modulate, lambda *given: (norm.rms_modulate(*given, EPS),), eager_modulate),
        Case(
            "rms_modulate -> fp8", modulate, lambda *given: norm.rms_modulate(*given, EPS, True),
            quantised(eager_modulate), fp8=True,
        ),
        Case("residual_rms_modulate", halves, ours_residual, eager_residual),
        Case("residual_rms_modulate, fp32", lambda: halves(torch.float32), ours_residual, eager_residual),
        Case(
            "residual_rms_modulate -> fp8", halves, lambda *given: ours_residual(*given, quantise=True),
            quantised(eager_residual), fp8=True,
        ),
        Case("residual.add", held, ours_held, eager_held),
        Case("residual_rms_modulate of sums", sums, ours_sums, eager_sums),
        Case(
            "residual ... of sums -> fp8", sums, lambda *given: ours_sums(*given, quantise=True),
            quantised(eager_sums), fp8=True,
        ),
        Case("modulation of 32 layers", layers, ours_layers, eager_layers),
        Case("layer_modulate", modulate, lambda x, _, scale: (norm.layer_modulate(x, scale, 1e-6),), eager_layer),
        Case("qk_norm_rope, by heads", heads, lambda *given: rope.qk_norm_rope(*given, EPS)[:2], eager_rope),
        Case(
            "qk_norm_rope, by tokens", heads,
            lambda *given: rope.qk_norm_rope(*given, EPS, layout="tokens")[:2], eager_rope,
        ),
        Case("silu_mul", gate, lambda a, b: (swiglu.silu_mul(a, b),), eager_gate),
        Case(
            "silu_mul -> fp8", gate, lambda a, b: swiglu.silu_mul(a, b, True), quantised(eager_gate), fp8=True,
        ),
    ]  # fmt: skip


def errors(case: Case, given: tuple) -> tuple[float, float]:
    """Relative error of ours and of eager against the eager composition in float64, the worst of the outputs."""
    exact = case.eager(*(tensor.double() for tensor in given))
    found = []
    for result in (case.ours(*given), case.eager(*given)):
        worst = 0.0
        for out, truth in zip(values(result, case.fp8), values(exact, case.fp8), strict=True):
            worst = max(worst, relative(out, truth))
        found.append(worst)
    return tuple(found)


def values(result: tuple, fp8: bool) -> list[torch.Tensor]:
    """The outputs as float64, codes and row scales multiplied."""
    outs = [out.double() for out in result]
    return [*outs[:-2], outs[-2] * outs[-1].view(*outs[-2].shape[:-1], 1)] if fp8 else outs


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def elementwise() -> list[dict]:
    """Gate, then time, every fused op; the copy of a tensor of 65 MB stands for what the memory can do."""
    every = cases("cuda")
    for case in every:
        ours, eager = errors(case, case.make())
        if not ours <= 2 * eager:  # so written that NaN fails
            sys.exit(f"{case.name}: error {ours:.2e} against {eager:.2e} of eager torch; nothing was timed")
    sets = [(torch.randn(TOKENS, WIDTH, device="cuda"), torch.empty(TOKENS, WIDTH, device="cuda")) for _ in range(SETS)]
    rows = [{"name": "copy", "ms": timed(lambda x, y: y.copy_(x), sets), "bytes": 2 * sets[0][0].nbytes}]
    for case in every:
        sets = [case.make() for _ in range(SETS)]
        row = {"name": case.name, "ms": timed(case.ours, sets), "eager_ms": timed(case.eager, sets)}
        row["bytes"] = sum(tensor.nbytes for tensor in (*sets[0], *case.ours(*sets[0])))
        if case.name.startswith("qk"):
            row["bytes"] -= sets[0][0].nbytes // 3  # v stays where it is
        rows.append(row)
    print(f"\n{'op':30}{'us':>9}{'TB/s':>8}{'eager us':>10}{'speed-up':>10}")
    for row in rows:
        middle = row["ms"][1]
        row["tb_s"] = row["bytes"] / middle / 1e9
        line = f"{row['name']:30}{middle * 1e3:9.1f}{row['tb_s']:8.2f}"
        if "eager_ms" in row:
            line += f"{row['eager_ms'][1] * 1e3:10.1f}{row['eager_ms'][1] / middle:9.1f}x"
        print(line, flush=True)
    return rows


def fp8_products() -> list[dict]:
    """FP8 products that scale rows and columns, and that leave the scales to the norm behind them, in 16 bit."""
    rows = []
    print(f"\n{'FP8 product':30}{'N':>7}{'K':>7}{'scaled us':>11}{'sums us':>9}{'TFLOP/s':>9}")
    for name, (width, columns) in PRODUCTS.items():
        weight = fp8.quantise_weight(torch.randn(width, columns, device="cuda") * 0.02)
        sets = [(*fp8.quantise_rows(torch.randn(TOKENS, columns, device="cuda")), *weight) for _ in range(SETS)]
        x, x_scales, codes, scales = sets[0]
        exact = x.double() @ codes.double().T
        found = relative(fp8.product(x, codes), exact)
        found = max(found, relative(fp8.linear(*sets[0], None, torch.bfloat16), exact * x_scales * scales))
        if not found <= 4 * relative(exact.bfloat16(), exact):  # tensor cores sum with fewer bits; NaN fails
            sys.exit(f"FP8 product {name}: error {found:.2e}; nothing was timed")
        row = {"name": name, "outputs": width, "columns": columns, "error": found}
        row["scaled_ms"] = timed(lambda *given: fp8.linear(*given, None, torch.bfloat16), sets)
        row["sums_ms"] = timed(lambda x, x_scales, codes, scales: fp8.product(x, codes), sets)
        row["tflop_s"] = 2 * TOKENS * width * columns / row["sums_ms"][1] / 1e9
        line = f"{row['scaled_ms'][1] * 1e3:11.1f}{row['sums_ms'][1] * 1e3:9.1f}{row['tflop_s']:9.0f}"
        print(f"{name:30}{width:7}{columns:7}{line}", flush=True)
        rows.append(row)
    return rows


def projections(layout: str):
    """q, k, v of unit spread, in memory by heads or by tokens."""
    order = (1, HEADS, TOKENS, HEAD_WIDTH) if layout == "heads" else (1, TOKENS, HEADS, HEAD_WIDTH)
    made = (torch.randn(order, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return tuple(part if layout == "heads" else part.transpose(1, 2) for part in made)


def exact_attention(q, k, v):
    heads = [
        ((q[:, h].double() @ k[:, h].double().mT) / HEAD_WIDTH**0.5).softmax(-1) @ v[:, h].double()
        for h in range(HEADS)
    ]
    return torch.stack(heads, 1)


def attention_backends() -> list[dict]:
    """Every backend that runs here, on q, k, v in both layouts; the gate is EXACT, or the error the backend states."""
    rows = []
    print(f"\n{'attention':30}{'layout':>8}{'ms':>9}{'TFLOP/s':>9}{'error':>10}")
    for layout in ("heads", "tokens"):
        sets = [projections(layout) for _ in range(SETS)]
        exact = exact_attention(*sets[0])
        for name, reason in attention.ATTENTION.refusals(attention.request(*sets[0])).items():
            if reason:
                print(f"{name:30}{layout:>8}  {reason}")
                continue
            backend = attention.ATTENTION.backends[name]
            run = partial(backend.function, lengths=None)
            rows.append(attention_row(name, layout, run, sets, exact, backend.error or EXACT))
    return rows


def attention_row(name, layout, run, sets, exact, allowed) -> dict:
    error = relative(run(*sets[0]), exact)
    if not error <= allowed:  # so written that NaN fails
        sys.exit(f"{name}: error {error:.2e} is above {allowed}; it was not timed")
    row = {"name": name, "layout": layout, "error": error, "ms": timed(run, sets)}
    row["tflop_s"] = 4 * HEADS * TOKENS**2 * HEAD_WIDTH / row["ms"][1] / 1e9
    print(f"{name:30}{layout:>8}{row['ms'][1]:9.3f}{row['tflop_s']:9.0f}{row['error']:10.1e}", flush=True)
    return row


def sweep() -> list[dict]:
    """Our 16-bit attention with other blocks, and the parts of its FP8 form."""
    from kernels import attention_triton, heads

    sets = [projections("tokens") for _ in range(SETS)]
    exact, fp8_error = exact_attention(*sets[0]), attention.ATTENTION.backends["triton-fp8"].error
    rows = []
    for blocks in ATTENTION_BLOCKS:
        name = "triton {}x{} w{} s{}".format(*blocks)
        run = partial(attention_triton.attention, lengths=None, blocks=blocks)
        rows.append(attention_row(name, "tokens", run, sets, exact, EXACT))
    coded = [(heads.quantise_heads(q), heads.quantise_heads(k), v) for q, k, v in sets]
    refusals = attention.ATTENTION.refusals(attention.request(*sets[0]))
    for kernel in attention_fp8.KERNELS:
        if refusals[kernel]:
            print(f"{kernel} cannot run: it {refusals[kernel]}")
            continue
        run = partial(attention_fp8.attention_of_codes, kernel)
        rows.append(attention_row(f"{kernel} of codes", "heads", run, coded, exact, fp8_error))
    parts = {
        "quantise q or k": lambda q, k, v: heads.quantise_heads(k),
        "quantise v, transposed": lambda q, k, v: heads.quantise_heads(v, transposed=True),
    }
    for name, run in parts.items():
        rows.append({"name": name, "ms": timed(run, sets)})
        print(f"{name:38}{rows[-1]['ms'][1]:9.3f}", flush=True)
    return rows


def row_sweep() -> list[dict]:
    """residual_rms_modulate, into bf16 and FP8, with every split of ROW_SPLITS; the first line is the rule's own."""
    from kernels import norm_triton

    by_name = {case.name: case for case in cases("cuda", ROWS_TOKENS)}
    rows = []
    print(f"\n{'op':30}{'rows':>6}{'warps':>7}{'stages':>8}{'us':>9}{'TB/s':>8}")
    for case in (by_name["residual_rms_modulate"], by_name["residual_rms_modulate -> fp8"]):
        sets = [case.make() for _ in range(SETS)]
        moved = sum(tensor.nbytes for tensor in (*sets[0], *case.ours(*sets[0])))
        for split in [norm_triton.row_split(ROWS_TOKENS, WIDTH), *ROW_SPLITS]:
            run = partial(residual_of_split, split, case.fp8)
            ours, eager = errors(replace(case, ours=run), sets[0])
            if not ours <= 2 * eager:  # so written that NaN fails
                sys.exit(f"{case.name} {split}: error {ours:.2e} against {eager:.2e} of eager torch; it was not timed")
            row = {"name": case.name, "split": split, "ms": timed(run, sets), "bytes": moved}
            row["tb_s"] = moved / row["ms"][1] / 1e9
            columns = "{:6}{:7}{:8}".format(*split)
            print(f"{case.name:30}{columns}{row['ms'][1] * 1e3:9.1f}{row['tb_s']:8.2f}", flush=True)
            rows.append(row)
    return rows


def residual_of_split(split, quantise, x, h, post_weight, gate, next_weight, scale):
    """norm.residual_rms_modulate with other rows of a program, warps and stages than the rule's."""
    from kernels import norm_triton

    x_out, (y, row_scales) = torch.empty_like(x), outputs(x.shape, FP8 if quantise else h.dtype, x.device, None)
    norm_triton.residual_rms_modulate(
        x, h, post_weight, gate, next_weight, scale, EPS, 1.0, x_out, y, row_scales, split=split
    )
    return (x_out, y, row_scales) if quantise else (x_out, y)


def timed(run: Callable, sets: list[tuple]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of the milliseconds of one call, from replays of a CUDA graph of 3 * SETS."""
    for given in sets:
        run(*given)  # compiles, and warms the allocator
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), 3 * sets
    with torch.cuda.graph(graph):
        for given in calls:
            run(*given)
    graph.replay()
    found = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / len(calls))
    ranks = statistics.quantiles(found, n=10)
    return ranks[1], statistics.median(found), ranks[7]


if __name__ == "__main__":
    main()
