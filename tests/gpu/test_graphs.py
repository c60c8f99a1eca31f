"""CUDA graphs on a GPU: what is replayed is what would be computed, whatever happens between two runs."""

import itertools
import subprocess
import sys

import comfy.model_management
import pytest
import torch

from zimage_turbo.engine import forward, graphs, measured, ode, sampling, shortage, turbo
from zimage_turbo.engine.model import load_model
from zimage_turbo.tests.comparison import relative_error
from zimage_turbo.tests.gpu import kernels, latents
from zimage_turbo.tests.gpu.latents import SIZES, draw, positive, with_lora
from zimage_turbo.tests.weights import small_transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
PRECISIONS = ["bf16", "fp16", "fp8", "int4", "int4-fp8"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return small_transformer(tmp_path_factory.mktemp("weights") / "small.safetensors", layers=2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_replay_is_what_would_be_computed(file, precision):
    patcher = load_model(file, precision)
    module = patcher.model.diffusion_model
    draw(patcher, (256, 256))
    expected = {turbo.FAST: graphs.WARM_UP, turbo.REPLAYED: 8 - graphs.WARM_UP}
    assert dict(module.forwards) == expected
    dtype = patcher.model.get_dtype_inference()
    x = torch.randn(1, 16, 32, 32, device="cuda", dtype=dtype)
    context, time = positive(5)[0][0].to("cuda", dtype), torch.tensor([0.6], device="cuda")
    replayed = module._forward(x, time, context, 40, transformer_options={"uuids": ["one"]})
    compute, exact = module.compute(x), module.compute(context, exact=True)
    caption = forward.refine_caption(module, context, exact)
    table = forward.rotation_table(module, caption.shape[1], 16, 16, x.device)
    assert torch.equal(replayed, forward.denoise(module, compute, x, time, caption, table))


@pytest.mark.parametrize("solver", list(ode.SOLVERS))
def test_every_solver_keeps_to_the_graph(file, solver):
    """All evaluations but the first are replayed, and the latent is that of a run without graphs."""
    patcher = load_model(file, "bf16")
    module, latent = patcher.model.diffusion_model, sampling.empty_latent(patcher, 256, 256, 1)

    def drawn():
        module.forwards.clear()
        result, (report,) = sampling.sample_and_report(patcher, positive(1), latent, 1, ode.sigmas(), solver=solver)
        return result["samples"], report.nfe

    replayed, nfe = drawn()
    assert dict(module.forwards) == {turbo.FAST: graphs.WARM_UP, turbo.REPLAYED: nfe - graphs.WARM_UP}
    module.graphs.give_up()
    assert torch.equal(drawn()[0], replayed)
    assert dict(module.forwards) == {turbo.FAST: nfe}


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_feed_forward_of_many_rows_is_computed_run_by_run(file, precision, monkeypatch):
    whole = draw(load_model(file, precision), (256, 256))
    monkeypatch.setattr(forward, "ROWS_AT_ONCE", 96)
    assert relative_error(draw(load_model(file, precision), (256, 256)), whole) < 0.01


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_forward_never_waits_for_the_gpu(file, precision):
    """Neither computed nor replayed, once kernels are compiled and tables made."""
    patcher = load_model(file, precision)
    draw(patcher, (256, 256))
    module, dtype = patcher.model.diffusion_model, patcher.model.get_dtype_inference()
    x = torch.randn(1, 16, 32, 32, device="cuda", dtype=dtype)
    context, time = positive(5)[0][0].to("cuda", dtype), torch.tensor([0.6], device="cuda")
    module.forwards.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        replayed = module._forward(x, time, context, 40, transformer_options={"uuids": ["one"]})
        module.graphs.give_up()
        computed = module._forward(x, time, context, 40, transformer_options={"uuids": ["one"]})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert dict(module.forwards) == {turbo.REPLAYED: 1, turbo.FAST: 1}
    assert torch.equal(replayed, computed)


@pytest.mark.parametrize(("precision", "side"), [("fp8", 256), ("fp8", 512), ("bf16", 512)])
def test_kernels_are_compiled_side_by_side_before_the_first_evaluation(file, monkeypatch, precision, side):
    """With nothing compiled in this process: the same latent, and every kernel got ready by the rehearsals."""
    expected = draw(load_model(file, precision), (side, side))
    compiled = kernels.forgotten(monkeypatch)
    patcher = load_model(file, precision)
    compiled.clear()  # of quantising
    assert torch.equal(draw(patcher, (side, side)), expected)
    assert len(compiled) > (5 if precision == "fp8" else 4) and all(aside for _, aside in compiled)
    if side == 512 and torch.cuda.get_device_capability()[0] == 9:
        assert any(name.endswith("swiglu_linear_triton") for name, _ in compiled)


def test_text_is_on_the_gpu_before_the_first_evaluation(file, monkeypatch):
    """A copy of it in every evaluation would make the host wait for the GPU, and the GPU for the host."""
    cast, devices = comfy.model_management.cast_to_device, []

    def watched(tensor, *arguments, **options):
        devices.append(tensor.device.type)
        return cast(tensor, *arguments, **options)

    patcher = load_model(file, "bf16")
    monkeypatch.setattr(comfy.model_management, "cast_to_device", watched)
    draw(patcher, (256, 256))
    assert devices == ["cuda"] * 8


@pytest.fixture(scope="module")
def of_a_fresh_process(file, comfyui, tmp_path_factory):
    """By precision, the latents that a process without a past draws."""
    out = tmp_path_factory.mktemp("fresh") / "latents.pt"
    subprocess.run([sys.executable, latents.__file__, comfyui, file, out, *PRECISIONS], check=True, timeout=300)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_lora_switches_and_sizes_leave_no_trace(file, precision, of_a_fresh_process):
    """Ten switches of LoRA and size give the latents that a fresh process gives."""
    patcher = load_model(file, precision)
    models, expected, apart = {"plain": patcher, "lora": with_lora(patcher)}, of_a_fresh_process[precision], {}
    for turn, (name, model) in itertools.product(range(10), models.items()):
        size = turn % len(SIZES)
        drawn, wanted = draw(model, SIZES[size]), expected[name][size]
        if not torch.equal(drawn, wanted):
            apart[turn, name] = relative_error(drawn, wanted)
    assert not apart, measured.read(measured.choices_file()).names


@pytest.mark.parametrize("precision", ["bf16", "int4-fp8"])
def test_offloaded_norms_come_along(file, precision):
    """The host offloads the smallest first: the forward stays the fast one, without a graph."""
    expected = draw(load_model(file, precision), (256, 256))
    patcher = load_model(file, precision)
    module = patcher.model.diffusion_model
    draw(patcher, (256, 256))
    module.forwards.clear()
    for norm in module.norms:
        norm.weight.data, norm.comfy_cast_weights = norm.weight.data.cpu(), True
    assert torch.equal(draw(patcher, (256, 256)), expected)
    assert dict(module.forwards) == {turbo.FAST: 8}


def test_unloading_frees_the_graphs(file):
    patcher = load_model(file, "bf16")
    before = draw(patcher, (256, 256))
    assert patcher.model.diffusion_model.graphs.captured.values
    comfy.model_management.unload_all_models()
    assert not patcher.model.diffusion_model.graphs.captured.values
    assert torch.equal(draw(patcher, (256, 256)), before)


def test_a_shortage_takes_the_memory_of_the_graphs(file):
    """Nobody else can use what a graph has reserved: it is given up for those who find none, and the model draws on."""
    patcher = load_model(file, "bf16")
    module = patcher.model.diffusion_model
    before = draw(patcher, (1024, 1024))
    torch.cuda.empty_cache()
    segments = [one for one in torch.cuda.memory_snapshot() if one["segment_pool_id"] == module.graphs.pool]
    size = sum(segment["total_size"] for segment in segments) // 4  # cuBLAS keeps a workspace there as well
    torch.cuda.set_per_process_memory_fraction(
        torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    )
    held = []
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            while True:  # what lies free beside the graph's
                held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        shortage.with_room(lambda _: torch.empty(size, dtype=torch.uint8, device="cuda"), torch.empty(0).cuda())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    module.forwards.clear()
    assert torch.equal(draw(patcher, (1024, 1024)), before)
    assert dict(module.forwards) == {turbo.FAST: 8}


def test_memory_stays_where_it_is(file):
    """Sizes come and go; what is allocated after the hundredth picture is what was after the tenth."""
    patcher, allocated = load_model(file, "bf16"), {}
    for turn in range(100):
        width, height = 192 + 16 * (turn * 5 % 13), 192 + 16 * (turn * 3 % 13)
        draw(patcher, (width, height), turn)
        if turn + 1 in (10, 100):
            torch.cuda.synchronize()
            allocated[turn + 1] = torch.cuda.memory_allocated()
    assert allocated[100] <= 1.01 * allocated[10]
