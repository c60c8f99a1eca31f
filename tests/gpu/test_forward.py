"""What the fast forward groups and leaves to others on a GPU: modulation of all blocks, scales of FP8 products."""

from dataclasses import replace

import comfy.utils
import pytest
import torch

from zimage_turbo.engine import formats, forward, graphs, layouts, modulation, ode, quantiser, sampling, turbo
from zimage_turbo.engine.checkpoint import Checkpoint
from zimage_turbo.engine.model import load_model
from zimage_turbo.kernels import attention_fp8, fp8, swiglu_linear
from zimage_turbo.tests.comparison import relative_error
from zimage_turbo.tests.gpu import kernels, latents
from zimage_turbo.tests.weights import small_transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and fp8.supported("cuda:0") is not None, reason="this GPU has no FP8 tensor cores"
)
POSITIVE = [[torch.randn(1, 40, 256, generator=torch.Generator().manual_seed(3)), {}]]
W2, OUT = (256, 768), (256, 256)
BLOCKS = 4  # that are evaluated every time: two of the noise refiner, two layers


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return small_transformer(tmp_path_factory.mktemp("weights") / "small.safetensors", layers=2)


@pytest.fixture
def products(monkeypatch):
    """Layers of every product of modulations that was made or captured."""
    real, taken = modulation.modulation.products, []

    def counted(time, weights, biases):
        taken.append(len(weights))
        return real(time, weights, biases)

    monkeypatch.setattr(modulation.modulation, "products", counted)
    return taken


def draw(patcher) -> torch.Tensor:
    latent = sampling.empty_latent(patcher, 256, 256, 1)
    return sampling.sample(patcher, POSITIVE, latent, 1, ode.sigmas())["samples"].float().cpu()


def with_lora(patcher):
    """A clone with the modulation of one layer patched."""
    return latents.with_lora(patcher, "layers.1.adaLN_modulation.0", 1024)


def test_a_lora_of_the_modulation_reaches_captured_graphs(file, products):
    patcher = load_model(file, "bf16")
    patched = with_lora(patcher)
    plain, loud = draw(load_model(file, "bf16")), draw(with_lora(load_model(file, "bf16")))
    assert relative_error(loud, plain) > 1e-3
    products.clear()
    for _ in range(3):
        assert torch.equal(draw(patcher), plain)
        assert torch.equal(draw(patched), loud)
    assert set(products) == {BLOCKS}
    assert dict(patcher.model.diffusion_model.forwards)[turbo.REPLAYED] == 6 * (8 - graphs.WARM_UP)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_one_product_gives_what_the_layers_give(file, precision, products, monkeypatch):
    """In fp32 to its rounding; in bf16 eight evaluations amplify what each rounds otherwise."""
    together = draw(load_model(file, precision))
    assert set(products) == {BLOCKS}
    products.clear()
    monkeypatch.setattr(modulation, "plain", lambda layers, device: False)
    assert relative_error(together, draw(load_model(file, precision))) < (0.02 if precision == "bf16" else 1e-4)
    assert not products


def test_offloaded_modulation_comes_along(file, products):
    expected = draw(load_model(file, "fp32"))
    patcher = load_model(file, "fp32")
    module = patcher.model.diffusion_model
    draw(patcher)
    products.clear()
    module.forwards.clear()
    for block in (*module.noise_refiner, *module.layers):
        linear = block.adaLN_modulation[0]
        linear.weight.data, linear.bias.data = linear.weight.data.cpu(), linear.bias.data.cpu()
        linear.comfy_cast_weights = True
    assert relative_error(draw(patcher), expected) < 1e-4
    assert not products
    assert dict(module.forwards) == {turbo.FAST: 8}


@needs_fp8
@pytest.mark.parametrize("attention", ["sdpa", *attention_fp8.KERNELS])
@pytest.mark.parametrize("precision", ["fp8", "int4-fp8"])
def test_products_that_leave_their_scales_err_no_more(file, precision, attention, tmp_path, monkeypatch):
    """One evaluation against fp32 with the same weights multiplied out."""
    kernels.skip_unless_it_runs(attention)
    kept = quantiser.quantised(Checkpoint.read(file), precision, torch.device("cuda"))
    comfy.utils.save_torch_file(
        dict(formats.expanded(kept, torch.float32).weights), str(tmp_path / "exact.safetensors")
    )
    real, left = layouts.sum_rows, []

    def counted(codes, weight):
        left.append(tuple(weight.shape))
        return real(codes, weight)

    def evaluated(patcher):
        draw(patcher)  # has the host load it
        module, dtype = patcher.model.diffusion_model, patcher.model.get_dtype_inference()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(1, 16, 32, 32, generator=generator).to("cuda", dtype)
        left.clear()
        time = torch.tensor([0.6], device="cuda")
        return module._forward(x, time, POSITIVE[0][0].to("cuda", dtype), 40).float()

    monkeypatch.setattr(layouts, "sum_rows", counted)
    monkeypatch.setattr(turbo.Graphs, "run", lambda *_: None)
    exact = evaluated(load_model(tmp_path / "exact.safetensors", "fp32"))
    assert not left
    sums = evaluated(load_model(file, precision, attention=attention))
    out = [OUT] if attention in attention_fp8.KERNELS and forward.OUT_AS_SUMS else []
    assert left[-BLOCKS * (len(out) + 1) :] == [*out, W2] * BLOCKS
    monkeypatch.setattr(forward, "leaves_scales", lambda linear, rows: False)
    scaled = evaluated(load_model(file, precision, attention=attention))
    assert not left
    errors = relative_error(sums, exact), relative_error(scaled, exact)
    print(f"{precision}, {attention}: {errors[0]:.4f} with sums, {errors[1]:.4f} without")
    assert errors[0] < 1.1 * errors[1] < 0.3


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="the fused kernel is Hopper's"
)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8", "int4-fp8"])
def test_gates_of_many_rows_are_one_kernel_each(file, precision, monkeypatch, tmp_path):
    """At 512 x 512, against fp32 with the same weights: no worse than two linears and the gate behind them."""
    form = precision if precision in quantiser.FORMS else None
    weights = Checkpoint.read(file)
    kept = quantiser.quantised(weights, precision, torch.device("cuda")) if form else weights
    comfy.utils.save_torch_file(
        dict(formats.expanded(kept, torch.float32).weights), str(tmp_path / "exact.safetensors")
    )
    ops, fused = (swiglu_linear.SWIGLU_LINEAR, swiglu_linear.SWIGLU_LINEAR_FP8), []

    def counted(function):
        def call(*arguments):
            fused.append(function)
            return function(*arguments)

        return call

    for op in ops:
        backends = {name: replace(each, function=counted(each.function)) for name, each in op.backends.items()}
        monkeypatch.setattr(op, "backends", backends | {"apart": op.backends["apart"]})
    generator = torch.Generator().manual_seed(1)
    x, time = torch.randn(1, 16, 64, 64, generator=generator), torch.tensor([0.6], device="cuda")

    def evaluated(patcher, times=1):
        draw(patcher)  # has the host load it
        module, dtype = patcher.model.diffusion_model, patcher.model.get_dtype_inference()
        fused.clear()
        given = x.to("cuda", dtype), time, POSITIVE[0][0].to("cuda", dtype), 40
        options = {"uuids": ["one"]}
        return [module._forward(*given, transformer_options=options).float() for _ in range(times)]

    (exact,) = evaluated(load_model(tmp_path / "exact.safetensors", "fp32"))
    assert not fused
    patcher = load_model(file, precision)
    together, replayed, again = evaluated(patcher, 3)
    assert len(fused) == 2 * BLOCKS and torch.equal(together, replayed) and torch.equal(replayed, again)
    of_both_sizes = {turbo.FAST: 2 * graphs.WARM_UP, turbo.REPLAYED: 8 - graphs.WARM_UP + 2}
    assert dict(patcher.model.diffusion_model.forwards) == of_both_sizes
    monkeypatch.setattr(swiglu_linear, "FEWEST_ROWS", 10**9)
    (apart,) = evaluated(load_model(file, precision))
    assert not fused
    errors = relative_error(together, exact), relative_error(apart, exact)
    print(f"{precision}: {errors[0]:.5f} in one kernel, {errors[1]:.5f} apart")
    assert errors[0] < 1.1 * errors[1] < 0.3
