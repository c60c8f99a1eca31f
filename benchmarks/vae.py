"""A VAE decode on one GPU, by the host's decoder and by ours: how fast, how exact, how much memory.

Random weights of the official shapes that keep the variance: they say how fast and how exact, not how pretty. Every
row of ours passes a gate first: its error against the host's decoder in fp32 is at most twice that of the host's in
bf16. `decode_ms` is the GPU's time for the decoder alone, `vae_decode_ms` the time of the host's VAE.decode up to the
pictures in main memory, `peak_mib` what a decode allocates beside weights and latents.
Run: ZIMAGE_COMFYUI=<tree> python benchmarks/vae.py [--size 512 1024 2048] [--batch 1 4] [--most 8] [--profile]
[--out FILE]
"""

import argparse
import json
import sys
import tempfile
import time
import types
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks import server_weights  # noqa: E402
from zimage_turbo.benchmarks.conditions import conditions  # noqa: E402
from zimage_turbo.benchmarks.gate import insist  # noqa: E402
from zimage_turbo.benchmarks.timing import milliseconds, quantiles  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402

FACTOR = 2  # times the host's own error in bf16
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs="+", default=[512, 1024, 2048], help="sides of pictures, in pixels")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--most", type=float, default=8, help="megapixels of a row; the host is slow beyond")
    parser.add_argument("--profile", action="store_true", help="print GPU time by kernel at the first size and batch")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    host.enter(host.tree(), [])
    import torch

    with torch.inference_mode():
        report = measure(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    insist(report["rows"])


def measure(arguments: argparse.Namespace) -> dict:
    import torch

    from zimage_turbo.engine import decoder

    exact_vae, contestants = build()
    report = {**conditions(), "rows": []}
    for size in arguments.size:
        for batch in arguments.batch:
            latents = torch.randn(batch, 16, size // 8, size // 8, generator=torch.Generator().manual_seed(size))
            if size * size * batch > arguments.most * 2**20:
                print(f"{batch} of {size}x{size}: left out, more than {arguments.most} megapixels", flush=True)
                continue
            if not fits(exact_vae, latents) or not fits(contestants["host"], latents, batch):
                print(f"{batch} of {size}x{size}: left out, more than this GPU has room for", flush=True)
                continue
            exact = in_fp32(exact_vae, latents)
            allowed = None
            for name, vae in contestants.items():
                error = ((decoded(vae, latents).float() - exact).norm() / exact.norm()).item()
                row = {"what": name, "size": size, "batch": batch, "error": round(error, 5)}
                row["gate"] = error < float("inf") and (allowed is None or error <= allowed)
                allowed = FACTOR * error if allowed is None else allowed
                if row["gate"]:
                    row |= figures(vae, latents)
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
            del exact
    if arguments.profile:
        shape = (arguments.batch[0], 16, arguments.size[0] // 8, arguments.size[0] // 8)
        for name, vae in contestants.items():
            print(f"{name}:\n{profile(vae, torch.randn(shape))}", flush=True)
    forwards = contestants["ours"].first_stage_model.decoder.forwards
    assert set(forwards) == {decoder.FAST}, dict(forwards)
    return report


def build() -> tuple:
    """The host's VAE in fp32; the host's and ours in bf16, by name; all on the GPU."""
    import comfy.model_management
    import comfy.sd
    import torch
    from safetensors.torch import save_file

    from zimage_turbo.engine.vae import load_vae

    weights = {name: weight.cpu() for name, weight in server_weights.vae().items()}
    exact = comfy.sd.VAE(sd=dict(weights), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, Path(folder) / "ae.safetensors")
        contestants = {"host": comfy.sd.VAE(sd=dict(weights)), "ours": load_vae(Path(folder) / "ae.safetensors")}
    patchers = [vae.patcher for vae in (exact, *contestants.values())]
    comfy.model_management.load_models_gpu(patchers, force_full_load=True)
    return exact, contestants


def fits(vae, latents, batch: int = 1) -> bool:
    """Whether the host's estimate for that many pictures is below what the GPU has free."""
    import torch

    torch.cuda.empty_cache()
    return batch * vae.memory_used_decode(latents.shape, vae.vae_dtype) < torch.cuda.mem_get_info()[0]


def on_gpu(vae, latents):
    return latents.to(vae.device, vae.vae_dtype)


def decoded(vae, latents):
    return vae.first_stage_model.decode(on_gpu(vae, latents))


def in_fp32(vae, latents):
    """One by one, without the TensorFloats that torch uses in convolutions unless told otherwise."""
    import torch

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.cat([decoded(vae, latent) for latent in latents.split(1)])


def figures(vae, latents) -> dict:
    """Medians with p20 and p80 in milliseconds; memory in MiB."""
    import torch

    given = on_gpu(vae, latents)
    vae.first_stage_model.decode(given)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vae.first_stage_model.decode(given)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    row = {
        "peak_mib": round(peak / MIB),
        "estimate_mib": round(vae.memory_used_decode(latents.shape, vae.vae_dtype) / MIB),
    }
    times = {
        "decode_ms": milliseconds(lambda: vae.first_stage_model.decode(given)),
        "vae_decode_ms": [elapsed(lambda: vae.decode(latents)) for _ in range(4)][1:],
    }
    for name, values in times.items():
        low, median, high = (round(value, 2) for value in quantiles(values))
        row |= {name: median, f"{name}_p20_p80": [low, high]}
    return row


def elapsed(run) -> float:
    """Milliseconds of a call that leaves its result in main memory."""
    started = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - started)


def profile(vae, latents) -> str:
    """A table of kernels by the time that the GPU spends in them."""
    import torch

    given = on_gpu(vae, latents)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        vae.first_stage_model.decode(given)
        torch.cuda.synchronize()
    return profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=90)


if __name__ == "__main__":
    main()
