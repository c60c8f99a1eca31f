"""One evaluation and eight of the full-size denoiser on one GPU: the host's forward, diffusers' and ours.

Random weights of the official shapes with loud channels: they say how fast and how exact, not how pretty. Every row
passes a gate first: its error against the host's fp32 forward, which for 16-bit rows must be at most twice the host's
own bf16 error, for the others what gate.py allows one evaluation. A batch holds two pictures and prompts in turn, and
the worst of all counts. Times are medians of as many runs as stand in the row, after an evaluation that is not counted.
Run: ZIMAGE_COMFYUI=<tree> python benchmarks/denoise.py [--size 1024 512] [--batch 1] [--rivals] [--rotated]
     [--out FILE]
--rotated adds INT4 rows whose weights are all rotated, as the quantiser does with heavy-tailed ones: products then turn
their inputs too, and what that costs does not depend on the numbers.
"""

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks import diffusers_model, gate  # noqa: E402
from zimage_turbo.benchmarks.conditions import conditions  # noqa: E402
from zimage_turbo.benchmarks.timing import milliseconds, quantiles  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402

WORDS, STEPS, DIFFERENT, LAYERS = 60, 8, 2, 30
PRECISIONS = ("bf16", "fp16", "fp8", "int4-fp8", "int4")
SIXTEEN_BIT = ("bf16", "fp16")
DEVICE = "cuda"
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[1024, 512], help="sides of square pictures, in pixels")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="pictures computed at once")
    parser.add_argument("--precision", nargs="*", default=list(PRECISIONS), choices=PRECISIONS, help="ours")
    parser.add_argument(
        "--rivals", action="store_true", help="diffusers too, which compiles for a minute: first size and batch only"
    )
    parser.add_argument("--rotated", action="store_true", help="rows with rotated INT4 weights beside those without")
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every row")
    arguments = parser.parse_args()
    host.enter(host.tree(), [])
    import torch

    with torch.inference_mode():
        benchmark = Benchmark(arguments.size, arguments.batch, arguments.out)
        benchmark.run(arguments.precision, arguments.rivals, arguments.rotated)
    gate.insist(benchmark.report["rows"])


def random_weights() -> Iterator[tuple[str, "torch.Tensor"]]:  # noqa: F821
    """30 layers in bf16 on the GPU, 12.3 GB, the same each time; gains near one, every 480th column 8 times as loud.

    One by one, so that a quantised model never stands beside all of what it was made from.
    """
    import comfy.ops
    import torch
    from comfy.ldm.lumina.model import NextDiT

    from zimage_turbo.tests.weights import FULL

    generator = torch.Generator(DEVICE).manual_seed(0)
    layers = comfy.ops.disable_weight_init
    empty = NextDiT(**FULL, n_layers=LAYERS, device="meta", dtype=torch.bfloat16, operations=layers)
    for name, value in empty.state_dict().items():
        noise = torch.randn(value.shape, device=DEVICE, dtype=torch.bfloat16, generator=generator)
        if name == "cap_embedder.0.weight" or ("norm" in name and name.endswith("weight")):
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.02
            if value.ndim == 2 and value.shape[1] == FULL["dim"]:
                noise[:, ::480] *= 8
        yield name, noise


def build(precision: str, rotated: bool = False):
    """The denoiser in a precision, as the loader makes it, and the seconds that its quantisation took."""
    import comfy.ops
    import torch
    from comfy.ldm.lumina.model import NextDiT

    from zimage_turbo.engine import layouts, model, quantiser, turbo
    from zimage_turbo.engine.operations import operations
    from zimage_turbo.tests.weights import FULL

    dtype = model.FLOATS.get(precision, torch.bfloat16)
    form, seconds, weights = quantiser.FORMS.get(precision), 0.0, {}
    for name, weight in random_weights():
        if form and quantiser.BLOCK_LINEAR.fullmatch(name):
            torch.cuda.synchronize()
            started = time.perf_counter()
            weights |= quantiser.parts(name, weight, form, rotate=rotated or None)
            torch.cuda.synchronize()
            seconds += time.perf_counter() - started
        else:
            weights[name] = weight.to(dtype)
    layers = comfy.ops.disable_weight_init
    if form:
        layers = operations(dtype, layouts.COMPUTE_FP8 if precision == "int4-fp8" else layouts.COMPUTE_16)
    # the quantising layers of the host put what is not quantised on their own device
    module = NextDiT(**FULL, n_layers=LAYERS, device=DEVICE if form else "meta", dtype=dtype, operations=layers)
    module.load_state_dict(weights, assign=True)
    turbo.adopt(module)
    return module, dtype, seconds


def request(size: int, batch: int, dtype) -> tuple:
    """What a forward takes: latents, times, texts and the number of words. Pictures repeat after DIFFERENT."""
    import torch

    def repeated(*shape: int) -> torch.Tensor:
        generator = torch.Generator(DEVICE).manual_seed(size)
        distinct = torch.randn(DIFFERENT, *shape, device=DEVICE, generator=generator)
        return distinct[torch.arange(batch, device=DEVICE) % DIFFERENT].to(dtype)

    return repeated(16, size // 8, size // 8), torch.full((batch,), 0.7, device=DEVICE), repeated(WORDS, 2560), WORDS


@dataclasses.dataclass
class Benchmark:
    """Rows by size and batch: the host in fp32 and bf16, ours, then the rivals."""

    sizes: list[int]
    batches: list[int]
    out: Path | None

    def run(self, precisions: list[str], rivals: bool, rotated: bool) -> None:
        import torch

        self.report = {**conditions(), "words": WORDS, "rows": []}
        print(json.dumps(self.report), flush=True)
        parts = [self.exact_outputs, self.host_rows]
        parts += [functools.partial(self.our_rows, precision) for precision in precisions]
        if rotated:
            turned = [precision for precision in precisions if precision.startswith("int4")]
            parts += [functools.partial(self.our_rows, precision, rotated=True) for precision in turned]
        parts += [self.rival_rows] if rivals else []
        for part in parts:
            part()
            gc.collect()  # its model
            torch.cuda.empty_cache()

    def exact_outputs(self) -> None:
        """By size, what the host computes in fp32 for each of the different pictures."""
        from comfy.ldm.lumina.model import NextDiT

        module, dtype, _ = build("fp32")
        self.exact = {
            size: [NextDiT._forward(module, *one)[0] for one in singles(request(size, DIFFERENT, dtype))]
            for size in self.sizes
        }

    def host_rows(self) -> None:
        """The host in bf16: the measure of what 16 bits cost."""
        from comfy.ldm.lumina.model import NextDiT

        module, dtype, _ = build("bf16")
        self.own_error = {}
        for size, batch in itertools.product(self.sizes, self.batches):
            stock = functools.partial(NextDiT._forward, module, *request(size, batch, dtype))
            row = self.record("host bf16", size, batch, stock, None)
            self.own_error[size] = max(row["error"], self.own_error.get(size, 0.0))

    def our_rows(self, precision: str, rotated: bool = False) -> None:
        from zimage_turbo.engine import turbo

        module, dtype, seconds = build(precision, rotated)
        name = f"ours {precision}, rotated" if rotated else f"ours {precision}"
        for size, batch in itertools.product(self.sizes, self.batches):
            options = {"uuids": [f"prompt of {size} and {batch}"]}  # as samplers name their prompts
            ours = functools.partial(module._forward, *request(size, batch, dtype), transformer_options=options)
            limit = 2 * self.own_error[size] if precision in SIXTEEN_BIT else gate.ONE_EVALUATION[precision]
            row = self.record(name, size, batch, ours, limit, quantise_s=round(seconds, 2))
            assert module.forwards[turbo.REPLAYED] or not row["gate"], dict(module.forwards)
            module.graphs.clear()

    def rival_rows(self) -> None:
        """diffusers as it comes and under torch.compile, which would compile anew for every other request."""
        import torch

        if not diffusers_model.installed():
            print("no diffusers rows: it is not installed. Install it with: python -m pip install diffusers")
            return
        size, batch = self.sizes[0], self.batches[0]
        self.report["diffusers"] = diffusers_model.version()
        module = diffusers_model.build(random_weights())
        x, timesteps, context, _ = request(size, batch, torch.bfloat16)
        limit = 2 * self.own_error[size]

        with diffusers_model.attention_of_its_own():
            eager = functools.partial(diffusers_model.forward, module, x, timesteps, context)
            self.record("diffusers bf16", size, batch, eager, limit)
            started = time.perf_counter()
            compiled = functools.partial(
                diffusers_model.forward, torch.compile(module, dynamic=False), x, timesteps, context
            )
            compiled()
            torch.cuda.synchronize()
            seconds = round(time.perf_counter() - started, 1)
            self.record("diffusers bf16, torch.compile", size, batch, compiled, limit, compile_s=seconds)

    def record(self, name: str, size: int, batch: int, run: Callable, limit: float | None, **more) -> dict:
        """Gate, then times; limit: the error allowed, None for the host's own, which sets the measure."""
        import torch

        torch.cuda.reset_peak_memory_stats()
        output = run()
        error = max(distance(picture, self.exact[size][i % DIFFERENT]) for i, picture in enumerate(output))
        held = bool(torch.isfinite(output).all()) and (limit is None or error <= limit)
        row = {"what": name, "size": size, "batch": batch, "error": round(error, 5), "bound": limit, "gate": held}
        row |= more
        if held:
            # two calls more before anything is timed: the second of a shape captures ours
            run(), run()
            row |= spread("forward", milliseconds(run, most=15, seconds=0.8))
            row |= spread("denoise", milliseconds(lambda: [run() for _ in range(STEPS)], fewest=1, seconds=4))
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        self.report["rows"].append(row)
        print(json.dumps(row), flush=True)
        if self.out:
            self.out.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        return row


def singles(inputs: tuple) -> Iterator[tuple]:
    """The pictures of a batch as requests of their own."""
    x, timesteps, context, words = inputs
    for i in range(len(x)):
        yield x[i : i + 1], timesteps[i : i + 1], context[i : i + 1], words


def distance(output, exact) -> float:
    return ((output.float() - exact).norm() / exact.norm()).item()


def spread(name: str, times: list[float]) -> dict[str, float]:
    p20, p50, p80 = (round(value, 2) for value in quantiles(times))
    return {f"{name}_ms": p50, f"{name}_p20_ms": p20, f"{name}_p80_ms": p80, f"{name}_runs": len(times)}


if __name__ == "__main__":
    main()
