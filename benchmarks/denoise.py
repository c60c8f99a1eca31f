"""One evaluation and eight of the full-size denoiser on one GPU: the host's forward and ours, in every precision.

Random weights of the official shapes with loud channels: they say how fast and how exact, not how pretty. Every row
passes a gate first: its error against the host's fp32 forward, which for 16-bit rows must be at most twice the host's
own bf16 error. Run: ZIMAGE_COMFYUI=<tree> python benchmarks/denoise.py [--size 1024 512] [--out FILE]
"""

import argparse
import gc
import json
import statistics
import sys
import time
import types
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks.conditions import conditions  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402

WORDS, STEPS, REPEATS = 60, 8, 7
PRECISIONS = ("bf16", "fp16", "fp8", "int4-fp8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[1024, 512], help="sides of square pictures, in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    host.enter(host.tree(), [])
    import torch

    with torch.inference_mode():
        report = measure(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def random_weights() -> dict:
    """All 30 layers in bf16 on the GPU, 12.3 GB; gains near one, every 480th column eight times as loud."""
    import comfy.ops
    import torch
    from comfy.ldm.lumina.model import NextDiT

    from zimage_turbo.tests.weights import FULL

    torch.cuda.manual_seed(0)
    empty = NextDiT(**FULL, n_layers=30, device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
    weights = {}
    for name, value in empty.state_dict().items():
        noise = torch.randn(value.shape, device="cuda", dtype=torch.bfloat16)
        if name == "cap_embedder.0.weight" or ("norm" in name and name.endswith("weight")):
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.02
            if value.ndim == 2 and value.shape[1] == FULL["dim"]:
                noise[:, ::480] *= 8
        weights[name] = noise
    return weights


def build(weights: dict, precision: str):
    """The denoiser in a precision, as the loader makes it; its quantisation is timed in seconds."""
    import comfy.ops
    import torch
    from comfy.ldm.lumina.model import NextDiT

    from zimage_turbo.engine import layouts, model, quantiser, turbo
    from zimage_turbo.engine.operations import operations
    from zimage_turbo.tests.weights import FULL

    started = time.perf_counter()
    dtype = model.FLOATS.get(precision, torch.bfloat16)
    layers = comfy.ops.disable_weight_init
    if precision in quantiser.FORMS:
        compute = layouts.COMPUTE_FP8 if precision == "int4-fp8" else layouts.COMPUTE_16
        layers = operations(dtype, compute)
        parts = {}
        for name, weight in weights.items():
            if quantiser.BLOCK_LINEAR.fullmatch(name):
                parts |= quantiser.parts(name.removesuffix(".weight"), weight, quantiser.FORMS[precision])
            else:
                parts[name] = weight
        weights = parts
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if precision not in quantiser.FORMS:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
    # the quantising layers of the host put what is not quantised on their own device
    device = "cuda" if precision in quantiser.FORMS else "meta"
    module = NextDiT(**FULL, n_layers=30, device=device, dtype=dtype, operations=layers)
    module.load_state_dict(weights, assign=True)
    turbo.adopt(module)
    return module, dtype, seconds


def milliseconds(run, repeats: int = REPEATS) -> float:
    """Median GPU time of a call."""
    import torch

    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def measure(arguments: argparse.Namespace) -> dict:
    import torch
    from comfy.ldm.lumina.model import NextDiT

    from zimage_turbo.engine import turbo

    report = {**conditions(), "batch": arguments.batch, "words": WORDS, "rows": []}
    weights = random_weights()

    def request(size: int, dtype) -> tuple:
        generator = torch.Generator("cuda").manual_seed(size)
        x = torch.randn(arguments.batch, 16, size // 8, size // 8, device="cuda", generator=generator)
        context = torch.randn(arguments.batch, WORDS, 2560, device="cuda", generator=generator)
        return x.to(dtype), torch.full((arguments.batch,), 0.7, device="cuda"), context.to(dtype), WORDS

    def record(name: str, size: int, output, run, exact, limit: float | None, **more) -> float:
        error = ((output.float() - exact).norm() / exact.norm()).item()
        held = bool(torch.isfinite(output).all()) and (limit is None or error <= limit)
        row = {"what": name, "size": size, "error": round(error, 5), "gate": held}
        if held:
            row["forward_ms"] = round(milliseconds(run), 2)
            row["denoise_ms"] = round(milliseconds(lambda: [run() for _ in range(STEPS)]), 1)
        row |= {"reserved_gib": round(torch.cuda.memory_reserved() / 2**30, 2), **more}
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        return error

    module, dtype, _ = build(weights, "fp32")
    exact = {size: NextDiT._forward(module, *request(size, dtype)) for size in arguments.size}
    del module
    free()
    own_error = {}
    for precision in arguments.precision:
        module, dtype, seconds = build(weights, precision)
        for size in arguments.size:
            inputs = request(size, dtype)
            if precision == "bf16":
                stock = lambda module=module, inputs=inputs: NextDiT._forward(module, *inputs)  # noqa: E731
                own_error[size] = record("host bf16", size, stock(), stock, exact[size], None)
            limit = 2 * own_error.get(size, 1.0) if precision in ("bf16", "fp16") else None
            options = {"uuids": [f"prompt of size {size}"]}  # as samplers name their prompts

            def ours(module=module, inputs=inputs, options=options):
                return module._forward(*inputs, transformer_options=options)

            record(f"ours {precision}", size, ours(), ours, exact[size], limit, quantise_s=round(seconds, 2))
            assert module.forwards[turbo.REPLAYED], dict(module.forwards)
        del module
        free()
    return report


def free() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
