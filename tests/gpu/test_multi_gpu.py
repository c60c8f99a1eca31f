"""A group of ranks on two GPUs: what they draw, alone and together, and what is left when one is killed or all end.

On one GPU both ranks share it: results are the same, only slower.
"""

import contextlib
import threading
import time

import psutil
import pytest
import torch

from zimage_turbo.engine import catalogue, ode, plan, sampling, spread, text
from zimage_turbo.engine.group.coordinator import Group
from zimage_turbo.engine.group.launch import Setup
from zimage_turbo.engine.group.team import Limits
from zimage_turbo.kernels import fp8
from zimage_turbo.tests.comparison import relative_error
from zimage_turbo.tests.weights import small_transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
DEVICES = ("cuda:0", "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0")
SETUP, LIMIT = Setup(DEVICES), 300.0
LIMITS = Limits(start=LIMIT)
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and fp8.supported("cuda:0") is not None, reason="this GPU has no FP8 tensor cores"
)
FP8 = [pytest.param(name, marks=needs_fp8) for name in ("fp8", "int4-fp8")]
IN_FP32 = 1e-4  # sums in another order; one head or token in the wrong place would be a hundred times that
UNLIKE = 0.1  # pictures of other prompts are 1.4 apart; eight evaluations amplify what is rounded otherwise
REPLAYED = 3  # runs of one evaluation: eager, captured, replayed
LEFT = 64 << 20  # bytes by which what the driver itself holds of a GPU may differ
PATIENCE = 20.0


@pytest.fixture(scope="module")
def group():
    with contextlib.closing(Group(SETUP, LIMITS)) as made:
        made.keep("meeting", "meet", {"islands": [[0, 1]], "size": 2}, LIMIT)
        yield made


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return small_transformer(tmp_path_factory.mktemp("weights") / "small.safetensors", layers=2)


def load(group, diffusion_model, vae, precision):
    request = {"key": "model", "diffusion_model": str(diffusion_model), "vae": vae and str(vae), "cache": False}
    group.call("forget", everyone({"key": "model"}), LIMIT)
    group.keep("model", "load", request | {"precision": precision, "attention": "auto"}, LIMIT)


def load_demo(group):
    parts = catalogue.resolve("demo", "auto", "auto")
    load(group, parts.diffusion_model, parts.vae, "auto")


def everyone(request):
    return lambda ranks: dict.fromkeys(range(ranks), request)


def image(number, positive, size=256):
    start = torch.zeros(1, 16, size // 8, size // 8)
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(number))
    return {"noise": noise, "latent": start, "mask": None, "seed": number, "positive": positive}


def demo_images(demo, count):
    prompts = ("a red circle at the top left", 'a white sign that says "AB"', "a small blue star")
    return [image(number, text.encode(demo[1], prompts[number % 3])) for number in range(count)]


def draw(group, images, ranks=2, split=plan.IMAGES, steps=ode.NFE, on_step=lambda *_: None):
    """Latents [B, 16, h, w]."""
    common = {"key": "model", "sigmas": ode.sigmas(steps), "solver": "official", "tolerance": 0.05}
    results = spread.draw(
        group, common | {"previews": False}, images, LIMIT, on_step,
        choose=lambda left, _: plan.choose(left, [range(ranks)], split),
    )  # fmt: skip
    return torch.cat([told["latent"] for told in results])


def decode(group, latents, ranks=2):
    shape = torch.Size((len(latents), *(8 * side for side in latents.shape[2:]), 3))
    return spread.decode(
        group, "model", latents, shape, torch.float32, LIMIT, choose=lambda left, _: spread.whole(left, ranks)
    )


def test_a_batch_on_two_gpus_is_that_of_one(group, demo):
    load_demo(group)
    images = demo_images(demo, 5)
    latents = draw(group, images)
    assert torch.equal(latents, draw(group, images, ranks=1))
    assert torch.equal(decode(group, latents), decode(group, latents, ranks=1))
    for given, drawn in zip(images, latents, strict=True):
        empty = sampling.empty_latent(demo[0], 256, 256, 1)
        here = sampling.sample(demo[0], given["positive"], empty, given["seed"], ode.sigmas())["samples"]
        assert torch.equal(here.cpu()[0], drawn)


@pytest.mark.parametrize("precision", ["bf16", "int4", *FP8])
def test_together_two_gpus_err_as_one_does(group, file, precision):
    """One evaluation, eager and by a graph, against fp32 of one."""
    positive = [[torch.randn(1, 40, 256, generator=torch.Generator().manual_seed(3)), {}]]

    def evaluated(ranks, split):
        runs = [draw(group, [image(1, positive)], ranks, split, 1) for _ in range(REPLAYED)]
        assert all(torch.equal(runs[0], run) for run in runs)
        return runs[0].double()

    load(group, file, None, "fp32")
    exact = evaluated(1, plan.IMAGES)
    assert relative_error(evaluated(2, plan.SEQUENCE), exact) < IN_FP32
    load(group, file, None, precision)
    own = relative_error(evaluated(1, plan.IMAGES), exact)
    together = relative_error(evaluated(2, plan.SEQUENCE), exact)
    print(f"{precision}: an error of {own:.2e} alone, {together:.2e} together")
    assert together <= 2 * own


@pytest.mark.parametrize(("number", "split"), [(1, plan.IMAGES), (0, plan.SEQUENCE)])
def test_a_rank_killed_on_the_way_loses_no_picture(group, demo, number, split):
    """Drawn together they are the same up to rounding: ranks in their place may find another exchange faster."""
    load_demo(group)
    images, begun = demo_images(demo, 4), threading.Event()
    wanted = draw(group, images, split=split)
    victim = psutil.Process(group.document()["ranks"][number]["pid"])

    def kill():
        begun.wait(LIMIT)
        victim.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    began = time.monotonic()
    drawn = draw(group, images, split=split, on_step=lambda *_: begun.set())
    killer.join()
    print(f"{time.monotonic() - began:.1f} s with a rank killed on the way")
    assert f"rank {number} ({DEVICES[number]}) ended" in group.document()["last_fault"]["what"]
    if split == plan.IMAGES:
        assert torch.equal(drawn, wanted)
    for one, other in zip(drawn, wanted, strict=True):
        assert relative_error(one, other) < UNLIKE
    assert group.document()["state"] == "ok"


def test_groups_leave_no_gpu_memory_behind(group, demo):
    """Two after one another, beside the tests' own, which is there before and after."""
    images = demo_images(demo, 2)
    free = settled()
    for _ in range(2):
        with contextlib.closing(Group(SETUP, LIMITS)) as made:
            load_demo(made)
            made.keep("meeting", "meet", {"islands": [[0, 1]], "size": 2}, LIMIT)
            draw(made, images, split=plan.SEQUENCE)
            assert all(now < before - LEFT for now, before in zip(free_memory(), free, strict=True))
        assert all(now >= before - LEFT for now, before in zip(settled(free), free, strict=True))


def free_memory():
    return [torch.cuda.mem_get_info(device)[0] for device in DEVICES]


def settled(wanted=(0, 0)):
    """Free bytes of each GPU, once that is as much as wanted or time is up: the driver frees a moment later."""
    end = time.monotonic() + PATIENCE
    while (free := free_memory()) and any(map(lambda now, wanted: now < wanted - LEFT, free, wanted)):
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    return free
