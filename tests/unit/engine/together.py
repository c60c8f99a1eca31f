"""Eight ranks over gloo, which compute what test_sequence.py holds against one process; a program of its own.

Ranks of fewer are subgroups of these, so one start serves every world size. Processes are forked where everything is
imported and no thread runs yet. Writes a JSON object: of each case by name, its error and whether ranks differ; under
"alone" what a rank says that waits for another one in vain, and after how many seconds.
Run: python together.py <ComfyUI tree> <folder>, which gets the file for the rendezvous and results.json
"""

import datetime
import functools
import itertools
import json
import multiprocessing
import sys
import time
import types
from multiprocessing import connection
from pathlib import Path

PACK = Path(__file__).resolve().parents[3]
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules.setdefault("zimage_turbo", package)  # test files import this one too

WORLD_SIZES = (2, 3, 4, 5, 8)
ODD = {"dim": 320, "n_heads": 10, "n_kv_heads": 10, "axes_dims": [8, 12, 12], "cap_feat_dim": 64}
SHAPES = {  # batch, height, width, words of the refined caption
    "even": (1, 32, 32, 64),
    "odd": (1, 30, 26, 37),
    "batch of 2": (2, 24, 28, 33),
    "fewer words than ranks": (1, 10, 6, 1),
}
EXACT, LOUD = 1e-5, 2.0**17
OWN_ERROR = {"fp8": 1.1, "fp16": 2.0}  # how much farther from fp32 ranks may be than one rank is
LIMIT = datetime.timedelta(seconds=30)  # of one exchange
WHOLE_LIMIT = 150  # seconds
SHORT_LIMIT = datetime.timedelta(seconds=0.5)


def odd_module(form=None, dtype=None):
    """Ten heads, so that ranks have different numbers of them, and chunks of stages may be empty.

    form: the weights of blocks are quantised; dtype: what others are held in. In fp16 attention's last products leave
    its range unless they are scaled down; the norm behind them makes that the same model.
    """
    import comfy.ops
    import torch
    from comfy.ldm.lumina.model import NextDiT

    from zimage_turbo.engine import layouts, quantiser, turbo
    from zimage_turbo.engine.operations import operations
    from zimage_turbo.tests.weights import FULL

    dtype, build = dtype or torch.float32, functools.partial(NextDiT, **FULL | ODD, n_layers=2)
    empty = build(device="meta", dtype=dtype, operations=comfy.ops.disable_weight_init)
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, value in empty.state_dict().items():
        gain = "norm" in name and name.endswith("weight")
        weight = gain + torch.randn(value.shape, generator=generator) * (0.1 if gain else 0.05)
        if dtype == torch.float16 and name.endswith("attention.out.weight"):
            weight *= LOUD
        if form and quantiser.BLOCK_LINEAR.fullmatch(name):
            weights |= quantiser.parts(name, weight, quantiser.FORMS[form])
        else:
            weights[name] = weight.to(dtype)
    layers = operations(dtype, layouts.COMPUTE_FP8) if form else comfy.ops.manual_cast
    module = build(device="cpu", dtype=dtype, operations=layers)
    module.load_state_dict(weights, assign=True)
    turbo.adopt(module)
    return module


def demo_module():
    from zimage_turbo.engine import catalogue
    from zimage_turbo.engine.model import load_model

    return load_model(catalogue.resolve("demo", "auto", "auto").diffusion_model, "fp32").model.diffusion_model


def request(module, batch, height, width, words):
    """What `forward.denoise` takes after the module and how to compute."""
    import torch

    from zimage_turbo.engine import forward

    generator = torch.Generator().manual_seed(height + words)
    x = torch.randn(batch, 16, height, width, generator=generator)
    caption = torch.randn(batch, words, module.dim, generator=generator)
    table = forward.rotation_table(module, words, height // 2, width // 2, x.device)
    return x, torch.rand(batch, generator=generator), caption, table


def evaluated(modules, name, shape, ranks=None):
    import torch

    from zimage_turbo.engine import forward

    dtype = torch.float16 if name == "fp16" else torch.float32
    x, timesteps, caption, table = request(modules[name], *SHAPES[shape])
    compute = forward.Compute(dtype, ranks=ranks)
    return forward.denoise(modules[name], compute, x.to(dtype), timesteps, caption, table).float()


def compare(modules, exact, results):
    """Every case of every world size that this rank takes part in. exact: of a model and shape, in fp32."""
    import torch
    import torch.distributed as dist

    from zimage_turbo.engine import sequence
    from zimage_turbo.engine.together import Together
    from zimage_turbo.tests.comparison import relative_error

    cpu, bounds, single = torch.device("cpu"), {}, dist.new_group([0])
    for name, shape in exact:
        bounds[name, shape] = EXACT
        if name in OWN_ERROR and dist.get_rank() == 0:
            one = evaluated(modules, name, shape, sequence.Ranks(cpu, single))
            bounds[name, shape] = OWN_ERROR[name] * relative_error(one, exact[name, shape])
    for size in WORLD_SIZES:
        together = Together(tuple(range(size)), dist.get_rank(), cpu, LIMIT)
        if together.ranks is None:
            continue
        assert together.least(dist.get_rank()) == 0 and together.any(dist.get_rank() == size - 1)
        for name, shape, form in cases():
            ranks = sequence.Ranks(cpu, together.ranks.group, form)
            ours = evaluated(modules, name, shape, ranks)
            total = ours.double().sum().item()
            error, most, least = ranks.slowest([relative_error(ours, exact[name, shape]), total, -total])
            found = {"error": error, "bound": bounds[name, shape], "differ": most != -least}
            results[case_name(size, name, shape, form)] = found


def case_name(size, module, shape, form):
    how = "gather" if form.gather else "all-to-all"
    return f"{size} ranks, {module}, {shape}, {how}, {form.stages} stages{', ahead' if form.ahead else ''}"


def cases():
    """(module, shape, form) by every world size."""
    from zimage_turbo.engine.sequence import FORMS

    exact = [("demo", "even"), *(("odd", shape) for shape in SHAPES if shape != "even")]
    ahead = [form for form in FORMS if form.ahead]
    return [
        *((*module, form) for module, form in itertools.product(exact, FORMS)),
        *((name, "odd", form) for name, form in itertools.product(OWN_ERROR, ahead)),
    ]


def alone(rank):
    """Of rank 0, which another one leaves to wait."""
    import torch

    from zimage_turbo.engine.group import jobs, wire
    from zimage_turbo.engine.together import Together

    pair = Together((0, 2), rank, torch.device("cpu"), SHORT_LIMIT)
    if rank > 0:
        return None
    began, job = time.monotonic(), jobs.Job("0", "draw", None, types.SimpleNamespace(call_soon_threadsafe=call))
    job.run(lambda job: pair.ranks.slowest([0.0]))
    _, body = job.frames.get_nowait()
    return wire.unpack(body) | {"seconds": time.monotonic() - began}


def call(function, *arguments):
    function(*arguments)


def run(rank, modules, exact, folder):
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=8, timeout=LIMIT)
    results = {}
    with torch.inference_mode():
        compare(modules, exact, results)
    results["alone"] = alone(rank)
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def main(comfyui, folder):
    from zimage_turbo.launcher.inside import host

    host.enter(Path(comfyui), [])
    import torch

    torch.set_num_threads(1)
    from zimage_turbo.engine import layouts, sequence  # noqa: F401  # imported once, before the fork

    layouts.takes_rows = lambda weight: hasattr(weight, "_qdata")  # as where there are FP8 tensor cores
    modules = {"demo": demo_module(), "odd": odd_module()}
    modules |= {"fp8": odd_module("fp8"), "fp16": odd_module(dtype=torch.float16)}
    with torch.inference_mode():
        exact = {
            (name, shape): evaluated(modules, "odd" if name in OWN_ERROR else name, shape)
            for name, shape in dict.fromkeys(case[:2] for case in cases())
        }
    start = multiprocessing.get_context("fork").Process
    ranks = [start(target=run, args=(rank, modules, exact, folder), daemon=True) for rank in range(8)]
    for rank in ranks:
        rank.start()
    running, end = {rank.sentinel: rank for rank in ranks}, time.monotonic() + WHOLE_LIMIT
    while running and all(rank.exitcode in (None, 0) for rank in ranks):
        done = connection.wait(running, max(0.0, end - time.monotonic()))
        if not done:
            break
        for sentinel in done:
            running.pop(sentinel).join()
    for rank in running.values():
        rank.kill()
    sys.exit(0 if all(rank.exitcode == 0 for rank in ranks) else "a rank failed, or took too long")


if __name__ == "__main__":
    main(*sys.argv[1:])
