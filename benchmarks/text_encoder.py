"""One prompt through the full-size text encoder on one GPU: the host's forward and ours, in bf16 and in INT4.

Random weights of Qwen3-4B with loud channels: they say how fast and how exact, not how well. From tokens to states on
the GPU, so a row holds what the host of the GPU does for it too. Every row passes a gate first: its error against the
host's own forward, which computes in fp32, with the same weights, at most twice that of the host's forward in bf16.
Run: ZIMAGE_COMFYUI=<tree> python benchmarks/text_encoder.py [--tokens 16 64 128 256 512] [--out FILE]
"""

import argparse
import gc
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks.conditions import conditions  # noqa: E402
from zimage_turbo.benchmarks.gate import insist  # noqa: E402
from zimage_turbo.benchmarks.timing import milliseconds, quantiles  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402

PRECISIONS = ("bf16", "int4")
DEVICE = "cuda"
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 128, 256, 512], help="lengths of prompts")
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS, help="ours")
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every row")
    arguments = parser.parse_args()
    host.enter(host.tree(), [])
    import torch

    with torch.inference_mode():
        benchmark = Benchmark(arguments.tokens, arguments.out)
        benchmark.run(arguments.precision)
    insist(benchmark.report["rows"])


def encoder_of(weights: dict, operations, sizes: dict):
    """The host's module with our class, as the loader makes it. sizes: what differs from Qwen3-4B."""
    import torch
    from comfy.text_encoders.z_image import Qwen3_4BModel

    from zimage_turbo.engine import encoder

    options = {"custom_operations": operations, "model_name": "qwen", "qwen_model_config": sizes}
    module = Qwen3_4BModel(device="meta", dtype=torch.bfloat16, model_options=options)
    module.transformer.load_state_dict(weights, assign=True)
    encoder.adopt(module, torch.bfloat16)
    module.set_clip_options({"execution_device": next(iter(weights.values())).device})
    return module


def build(precision: str, sizes: dict, device: str = DEVICE):
    """The text encoder in a precision, and the seconds that its quantisation took."""
    import comfy.ops
    import torch

    from zimage_turbo.engine import layouts, quantiser
    from zimage_turbo.engine.operations import operations
    from zimage_turbo.tests.weights import random_text_encoder

    weights, started = random_text_encoder(sizes, device), time.perf_counter()
    if precision == "bf16":
        return encoder_of(weights, comfy.ops.manual_cast, sizes), 0.0
    for name in list(weights):
        if quantiser.TEXT_LINEAR.fullmatch(name):
            weights |= quantiser.parts(name, weights.pop(name), layouts.INT4)
    module = encoder_of(weights, operations(torch.bfloat16, layouts.COMPUTE_16), sizes)
    if device == DEVICE:
        torch.cuda.synchronize()
    return module, time.perf_counter() - started


def prompt(count: int, vocabulary: int) -> list[list[int]]:
    """As many tokens as asked for, none of which is the one that pads."""
    return [[(7919 * i + 31 * count) % (vocabulary - 1000) for i in range(count)]]


class Benchmark:
    def __init__(self, counts: list[int], out: Path | None):
        self.counts, self.out = counts, out
        self.report = {**conditions(), "rows": []}
        print(json.dumps(self.report), flush=True)

    def run(self, precisions: list[str]) -> None:
        module, _ = build("bf16", {})
        self.host_rows(module)
        del module
        free()
        for precision in precisions:
            self.our_rows(precision)

    def host_rows(self, module) -> None:
        """The host as it computes text, in fp32, and in bf16: the measure of what 16 bits cost."""
        import torch
        from comfy.text_encoders.z_image import Qwen3_4BModel

        model, self.own_error, self.exact = module.transformer.model, {}, {}

        def in_bf16(tokens):
            embeds, mask, counts, _ = module.process_tokens(tokens, torch.device(DEVICE))
            return model(None, mask, embeds.bfloat16(), counts, module.layer_idx, False)[1].float()

        for count in self.counts:
            tokens = prompt(count, model.vocab_size)
            self.exact[count] = Qwen3_4BModel.forward(module, tokens)[0]
            self.own_error[count] = distance(in_bf16(tokens), self.exact[count])
            exact, own = self.exact[count], self.own_error[count]
            self.record("host", exact, own, lambda tokens=tokens: Qwen3_4BModel.forward(module, tokens)[0])
            self.record("host in bf16", exact, own, lambda tokens=tokens: in_bf16(tokens))

    def our_rows(self, precision: str) -> None:
        import torch
        from comfy.text_encoders.z_image import Qwen3_4BModel

        from zimage_turbo.engine import turbo

        module, seconds = build(precision, {})
        for count in self.counts:
            tokens = prompt(count, module.transformer.model.vocab_size)
            exact = Qwen3_4BModel.forward(module, tokens)[0]
            ours = module.forward(tokens)[0]
            more = {
                "weights_error": round(distance(exact, self.exact[count]), 5),
                "replay_is_eager": torch.equal(module.forward(tokens)[0], ours),
                "quantise_s": round(seconds, 2),
            }
            limit = 2 * self.own_error[count]
            self.record(f"ours {precision}", exact, limit, lambda ours=module.forward, t=tokens: ours(t)[0], **more)
        print(dict(module.forwards), flush=True)
        assert module.forwards[turbo.REPLAYED], "no graph was replayed"
        del module
        free()

    def record(self, name: str, exact, limit: float, run: Callable, replay_is_eager: bool = True, **more) -> None:
        """Gate, then times. limit: the distance from `exact` allowed."""
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = run()
        error = distance(output, exact)
        held = bool(torch.isfinite(output).all()) and error <= limit and replay_is_eager
        row = {"what": name, "tokens": output.shape[1], "error": round(error, 6), "gate": held, **more}
        if held:
            p20, p50, p80 = (round(value, 3) for value in quantiles(milliseconds(run, most=25, seconds=0.5)))
            row |= {"ms": p50, "p20_ms": p20, "p80_ms": p80}
        row |= {"model_gib": round(before / GIB, 2), "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2)}
        self.report["rows"].append(row)
        print(json.dumps(row), flush=True)
        if self.out:
            self.out.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")


def distance(output, exact) -> float:
    return ((output.float() - exact).norm() / exact.norm()).item()


def free() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
