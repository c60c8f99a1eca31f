"""Prompts that begin alike through the text encoder: with pages of keys and values, and each computed afresh.

Two workloads of as many prompts, shuffled: `styles`, where a style of 20 to 200 tokens stands before an edited tail,
and `unrelated`, of the same lengths, which shows what keeping pages costs where nothing is shared. Memory: what the
pages take that hold all those prompts, against 512 tokens reserved for each. Every state is compared with the one
computed afresh first, and no time is reported where they differ by more than roundings: of fp32 a few, and of 16 bits
what lies between those computed afresh and the host's own, in fp32.
Run: ZIMAGE_COMFYUI=<tree> python benchmarks/paged_cache.py [--prompts 500] [--out FILE] [--random-weights]
The demo's text encoder on the processor, or random weights of Qwen3-4B on a GPU, where pages are used for this only.
"""

import argparse
import json
import random
import statistics
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks.conditions import conditions  # noqa: E402
from zimage_turbo.benchmarks.gate import insist  # noqa: E402
from zimage_turbo.benchmarks.timing import quantiles  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402

STYLES = (20, 50, 100, 200)  # tokens
VARIANTS = 3  # styles of each length
HEAD, END = 3, 5  # tokens of the chat template before and behind a prompt
RESERVED = 512  # tokens that a fixed reservation has for every prompt
ROUNDINGS = 8  # that a sum of the same numbers in another order may be away
JUDGED = 12  # prompts that a 16-bit encoder's own error is taken from
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=500, help="of each workload")
    parser.add_argument("--rounds", type=int, default=3, help="each prompt counts with its shortest time")
    parser.add_argument("--random-weights", action="store_true", help="Qwen3-4B's sizes, on a GPU if there is one")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    host.enter(host.tree(), [])
    import torch

    with torch.inference_mode():
        module, _loaded = full_size() if arguments.random_weights else demo()
        report = measure(module, arguments.prompts, arguments.rounds)
    report["encoder"] = "Qwen3-4B, random weights" if arguments.random_weights else "demo"
    print(json.dumps(report, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    insist(report["rows"])


def demo():
    """The demo's text encoder as the loader gives it, and the patcher, by which the host knows it while it is held."""
    import torch

    from zimage_turbo.engine import catalogue, text

    clip = text.load_text_encoder(catalogue.DEMO_FOLDER / "text_encoder", torch.device("cpu"))
    return clip.cond_stage_model.qwen3_4b, clip.load_model()


def full_size():
    """The same with random weights of the official sizes, in bf16."""
    import comfy.model_management as management
    import torch
    from comfy.model_patcher import ModelPatcher

    from zimage_turbo.benchmarks.text_encoder import build

    device = management.get_torch_device()
    module, _ = build("bf16", {}, str(device))
    holder = torch.nn.Module()
    holder.qwen3_4b = module
    patcher = ModelPatcher(holder, load_device=device, offload_device=device)
    management.load_models_gpu([patcher], force_full_load=True)
    return module, patcher


def workloads(count: int, vocabulary: int) -> dict[str, list[tuple[int, list[int]]]]:
    """(tokens of the style, all tokens) of every prompt, by workload. None is the token that pads."""
    random_ = random.Random(20)

    def tokens(number: int) -> list[int]:
        return [random_.randrange(1, vocabulary - 1) for _ in range(number)]

    head, end = tokens(HEAD), tokens(END)
    styles = [tokens(number) for number in STYLES for _ in range(VARIANTS)]
    chosen = [styles[number % len(styles)] for number in range(count)]
    random_.shuffle(chosen)
    tails = [random_.randint(5, 40) for _ in chosen]
    return {
        "styles": [(len(s), head + s + tokens(tail) + end) for s, tail in zip(chosen, tails, strict=True)],
        "unrelated": [(len(s), tokens(HEAD + len(s) + tail + END)) for s, tail in zip(chosen, tails, strict=True)],
    }


def measure(module, count: int, rounds: int) -> dict:
    import torch

    report = {**conditions(), "threads": torch.get_num_threads(), "compute": str(module.compute), "rows": []}
    loads = workloads(count, module.transformer.model.vocab_size)
    for name, prompts in loads.items():
        errors, bound = compare(module, [ids for _, ids in prompts]), rounding(module, [ids for _, ids in prompts])
        held = max(errors) <= bound
        row = {"what": name, "prompts": count, "gate": held, "worst_error": max(errors), "bound": bound}
        row |= {"equal_to_the_bit": errors.count(0.0)} | (timed(module, prompts, rounds) if held else {})
        report["rows"].append(row | memory(module, [ids for _, ids in prompts]))
    return report


def compare(module, prompts: list[list[int]]) -> list[float]:
    """How far each prompt's states with pages are from those computed afresh, as a share of their norm."""
    from zimage_turbo.tests.comparison import relative_error

    with paged(False):
        exact = [module.forward([ids])[0].cpu() for ids in prompts]
    module.pool.clear()
    with paged(True):
        states = [module.forward([ids])[0].cpu() for ids in prompts]
    return [relative_error(ours, theirs) for ours, theirs in zip(states, exact, strict=True)]


def rounding(module, prompts: list[list[int]]) -> float:
    """What two ways of computing the same may differ by, as a share of the norm of a prompt's states."""
    import torch
    from comfy.text_encoders.z_image import Qwen3_4BModel

    from zimage_turbo.tests.comparison import relative_error

    if module.compute == torch.float32:
        return ROUNDINGS * torch.finfo(torch.float32).eps
    with paged(False):
        pairs = [(module.forward([ids])[0], Qwen3_4BModel.forward(module, [ids])[0]) for ids in prompts[:JUDGED]]
    return max(relative_error(ours, hosts) for ours, hosts in pairs)


@contextmanager
def paged(wanted: bool) -> Iterator[None]:
    """With pages on any device, or with none; without them a GPU replays graphs."""
    from zimage_turbo.engine import encoder

    usual, encoder.PAGED = encoder.PAGED, ("cpu", "cuda") if wanted else ()
    try:
        yield
    finally:
        encoder.PAGED = usual


def timed(module, prompts: list[tuple[int, list[int]]], rounds: int) -> dict:
    """Milliseconds of a prompt and seconds of all, each round from empty pages; and what was found in them.

    Each prompt is encoded both ways in turn, so that what else the machine does meets both.
    """
    times = {False: [], True: []}
    for _ in range(rounds):
        module.pool.clear()
        for kept in times.values():
            kept.append([])
        for _, ids in prompts:
            for wanted, kept in times.items():
                with paged(wanted):
                    kept[-1].append(milliseconds(module, ids))
    counts, size = module.pool.pages.counts, module.pool.pages.size
    afresh, with_pages = ([min(each) for each in zip(*kept, strict=True)] for kept in times.values())
    by_style = {}
    for number in STYLES:
        chosen = [place for place, (style, _) in enumerate(prompts) if style == number]
        alone, shared = (statistics.median(times[place] for place in chosen) for times in (afresh, with_pages))
        by_style[str(number)] = {"afresh_ms": round(alone, 3), "pages_ms": round(shared, 3)}
    return {
        "afresh": summary(afresh),
        "pages": summary(with_pages),
        "time_saved": round(1 - sum(with_pages) / sum(afresh), 4),
        "by_tokens_of_style": by_style,
        "tokens_known": round(counts["known"] / counts["tokens"], 4),
        "page_tokens": size,
        "pages_evicted": counts["evicted"],
    }


def milliseconds(module, ids: list[int]) -> float:
    """Until the states are there: wall-clock time, Python's included."""
    import torch

    started = time.perf_counter()
    module.forward([ids])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1000


def summary(times: list[float]) -> dict:
    p20, p50, p80 = (round(value, 3) for value in quantiles(times))
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "all_s": round(sum(times) / 1000, 3)}


def memory(module, prompts: list[list[int]]) -> dict:
    """MiB that hold the keys, values and states of all prompts, in pages and reserved; what the bounded pool had."""
    from zimage_turbo.engine.pages import Pages

    module.pool.clear()
    with paged(True):
        for ids in prompts:
            module.forward([ids])
        shape, size = module.pool.state[0], module.pool.pages.size
        pool = {
            "pool_mib": round(module.pool.nbytes / MIB, 2),
            "pool_pages": len(module.pool.pages.free) + len(module.pool.pages.found),
            "pool_prompts_whole": whole(module.pool.pages, prompts),
            "pool_prompts_reserved": module.pool.nbytes // (RESERVED * shape.token_bytes),
        }
    endless = Pages(sum(len(ids) // size for ids in prompts), size)
    for ids in prompts:
        with endless.lease(ids):
            pass
    tokens = {
        "pages": len(endless.found) * size,
        "pages_unshared": sum(len(ids) // size for ids in prompts) * size,
        "reserved": RESERVED * len(prompts),
    }
    return pool | {f"{name}_mib": round(count * shape.token_bytes / MIB, 2) for name, count in tokens.items()}


def whole(pages, prompts: list[list[int]]) -> int:
    """Of how many prompts all whole pages are there."""
    chunks = [pages.split(ids) for ids in prompts]
    return sum(len(pages.find(each)) == len(each) for each in chunks)


if __name__ == "__main__":
    main()
