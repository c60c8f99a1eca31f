"""The fast forward and linears of every kind: gates, FP8 rows and their scales, and the stream beside them."""

import comfy.ops
import pytest
import torch
from comfy.ldm.lumina.model import NextDiT
from safetensors.torch import save_file

from zimage_turbo.engine import formats, forward, layouts, quantiser, turbo
from zimage_turbo.engine.checkpoint import Checkpoint
from zimage_turbo.engine.model import load_model
from zimage_turbo.kernels import fp8, swiglu_linear
from zimage_turbo.tests.comparison import relative_error
from zimage_turbo.tests.unit.engine.inputs import request_of
from zimage_turbo.tests.weights import small_transformer

OWN_ERROR = {torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 0.003}
FP8_OWN_ERROR = 0.1  # of a whole forward
W2 = (256, 768)
BLOCKS = 6  # two of each refiner, two layers


def test_columns_that_a_norm_multiplies_by_nothing_are_not_forgotten(tmp_path):
    """The stream lives on in its norm, where such columns would be zeros."""
    module = plain_module(tmp_path)
    for i, block in enumerate(module.layers):
        for part in (block.attention_norm1, block.ffn_norm1):
            part.weight.data[i::50] = 0
    request = *request_of(1, 24, 28, 21), 21
    assert relative_error(module._forward(*request), NextDiT._forward(module, *request)) < 2e-5


@pytest.mark.parametrize("dtype", OWN_ERROR, ids=["fp32", "bf16", "fp16"])
def test_the_stream_is_held_as_its_norm_where_that_has_its_type(tmp_path, held, dtype):
    """In fp16 the stream is fp32."""
    module, (x, timesteps, context) = plain_module(tmp_path), request_of(1, 24, 28, 21)
    exact, request = module._forward(x, timesteps, context, 21), (x.to(dtype), timesteps, context.to(dtype), 21)
    module.to(dtype)
    held.clear()
    ours = module._forward(*request)
    assert len(held) == (0 if dtype == torch.float16 else 2 * BLOCKS)
    assert relative_error(ours.float(), exact) < OWN_ERROR[dtype]


def test_a_stream_beside_fp8_rows_is_a_tensor(files_in_fp8, fp8_rows, held):
    """Of which one linear of one block takes some: its scales are left to the norm."""
    module = load_model(files_in_fp8["fp8"][0], "auto").model.diffusion_model
    module._forward(*request_of(1, 24, 28, 21), 21)
    assert fp8_rows and not held
    for linear in quantised_linears(module):
        if linear is not module.layers[1].feed_forward.w2:
            patched(linear)
    fp8_rows.clear()
    module._forward(*request_of(1, 24, 28, 21), 21)
    assert fp8_rows == [W2] and len(held) == 2 * (BLOCKS - 2)


def lora_beside(linear):
    forward_of = linear.forward
    linear.forward = lambda x: forward_of(x) * -8


def lora_on(linear):
    linear.weight_function = [lambda weight: weight * -8]


def bias_of_ones(linear):
    linear.bias = torch.nn.Parameter(torch.ones(len(linear.weight)), requires_grad=False)


def watched(linear):
    linear.register_forward_hook(lambda _, given, product: product * -8)


def stored_by_columns(linear):
    linear.weight = torch.nn.Parameter(linear.weight.t().contiguous().t(), requires_grad=False)


@pytest.fixture
def held(monkeypatch):
    """The additions to a stream that is held as its norm."""
    real, additions = forward.residual.add, []

    def counted(x, *given, **more):
        additions.append(type(x))
        return real(x, *given, **more)

    monkeypatch.setattr(forward.residual, "add", counted)
    return additions


@pytest.fixture
def gated_together(monkeypatch):
    """The rows of each call that multiplied by both weights of a gate at once."""
    real, rows = swiglu_linear.linear, []

    def counted(x, *weights_and_factor):
        rows.append(len(x))
        return real(x, *weights_and_factor)

    monkeypatch.setattr(swiglu_linear, "linear", counted)
    return rows


def test_a_gate_of_plain_weights_is_one_op(tmp_path, gated_together):
    module, request = plain_module(tmp_path), (*request_of(1, 24, 28, 21), 21)
    ours = module._forward(*request)
    assert len(gated_together) == len(module.layers) + len(module.noise_refiner) + len(module.context_refiner)
    assert relative_error(ours, NextDiT._forward(module, *request)) < 2e-5


@pytest.mark.parametrize("changed", ["w1", "w3"])
@pytest.mark.parametrize("change", [lora_beside, lora_on, bias_of_ones, watched, stored_by_columns])
def test_a_gate_with_something_else_in_it_is_two_linears(tmp_path, gated_together, change, changed):
    module, request = plain_module(tmp_path), (*request_of(1, 24, 28, 21), 21)
    module._forward(*request)
    before = len(gated_together)
    change(getattr(module.layers[1].feed_forward, changed))
    ours = module._forward(*request)
    assert len(gated_together) == 2 * before - 1
    assert relative_error(ours, NextDiT._forward(module, *request)) < 2e-5


def test_layers_of_the_hosts_cublas_ops_are_called(tmp_path, gated_together, monkeypatch):
    module = plain_module(tmp_path)
    monkeypatch.setattr(comfy.ops, "CublasLinear", type(module.layers[0].feed_forward.w1), raising=False)
    module._forward(*request_of(1, 24, 28, 21), 21)
    assert module.forwards[turbo.FAST] and not gated_together


def test_a_gate_of_int4_weights_in_16_bit_is_two_linears(files_in_fp8, gated_together):
    file, whole = files_in_fp8["int4"]
    request = *request_of(1, 24, 28, 21), 21
    exact = load_model(whole, "fp32").model.diffusion_model._forward(*request)
    gated_together.clear()
    ours = load_model(file, "int4").model.diffusion_model._forward(*request)
    assert not gated_together and relative_error(ours, exact) < 1e-3


def plain_module(folder):
    return load_model(small_transformer(folder / "small.safetensors", layers=2), "fp32").model.diffusion_model


@pytest.fixture(scope="module")
def files_in_fp8(tmp_path_factory):
    """A model whose block weights are stored in FP8, in INT4, and in fp32 with the values that those stand for."""
    folder, made = tmp_path_factory.mktemp("fp8"), {}
    whole = Checkpoint.read(small_transformer(folder / "small.safetensors", layers=2))
    for form in ("fp8", "int4"):
        kept = quantiser.quantised(whole, form, torch.device("cpu"))
        made[form] = folder / f"{form}.safetensors", folder / f"{form}_fp32.safetensors"
        save_file(dict(kept.weights), made[form][0])
        save_file(dict(formats.expanded(kept, torch.float32).weights), made[form][1])
    return made


@pytest.fixture
def fp8_rows(monkeypatch):
    """The processor takes FP8 rows, as a GPU with FP8 tensor cores does; the products that left their scales."""
    real, products = layouts.sum_rows, []

    def counted(codes, weight):
        products.append(tuple(weight.shape))
        return real(codes, weight)

    monkeypatch.setattr(layouts, "takes_rows", lambda weight: layouts.is_int4(weight) or hasattr(weight, "_qdata"))
    monkeypatch.setattr(layouts, "sum_rows", counted)
    return products


def quantised_linears(module):
    linears = [part for part in module.modules() if hasattr(getattr(part, "weight", None), "_params")]
    assert linears
    return linears


@pytest.mark.parametrize("form", ["fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_last_product_leaves_its_scales_to_the_norm(files_in_fp8, fp8_rows, monkeypatch, form, dtype):
    """What leaves the scales errs as what applies them does. In fp16 activations are scaled as well."""
    file, whole = files_in_fp8[form]
    x, timesteps, context = request_of(1, 24, 28, 21)
    exact = load_model(whole, "fp32").model.diffusion_model._forward(x, timesteps, context, 21)
    module = load_model(file, "auto").model.diffusion_model
    for linear in quantised_linears(module):
        object.__setattr__(linear.weight._params, "orig_dtype", dtype)
    request = x.to(dtype), timesteps, context.to(dtype), 21
    ours = module._forward(*request).float()
    assert fp8_rows == [W2] * BLOCKS
    assert module.forwards[turbo.FAST]
    monkeypatch.setattr(forward, "leaves_scales", lambda linear, rows: False)
    scaled = module._forward(*request).float()
    assert fp8_rows == [W2] * BLOCKS
    assert relative_error(ours, exact) < 1.1 * relative_error(scaled, exact) < FP8_OWN_ERROR


def test_what_is_normed_from_sums_has_the_type_that_is_computed_in(files_in_fp8, fp8_rows):
    """Sums are bf16, but a layer that takes no FP8 rows gets fp16."""
    module = load_model(files_in_fp8["fp8"][0], "auto").model.diffusion_model
    linear, given = module.layers[1].attention.qkv, []
    patched(linear)
    linear.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].dtype))
    x, timesteps, context = request_of(1, 24, 28, 21)
    module._forward(x.half(), timesteps, context.half(), 21)
    assert given == [torch.float16] and fp8_rows


@pytest.mark.parametrize("rows", [1, 40, 100])
def test_runs_of_a_feed_forward_leave_their_scales(files_in_fp8, fp8_rows, monkeypatch, rows):
    module = load_model(files_in_fp8["fp8"][0], "auto").model.diffusion_model
    request = *request_of(2, 24, 28, 21), 21
    whole = module._forward(*request)
    monkeypatch.setattr(forward, "ROWS_AT_ONCE", rows)
    assert relative_error(module._forward(*request), whole) < 1e-3
    assert len(fp8_rows) > 2 * BLOCKS


def bypassed(linear):
    linear.forward = lambda x: type(linear).forward(linear, x)


def with_bias(linear):
    linear.bias = torch.nn.Parameter(torch.zeros(256), requires_grad=False)


def patched(linear):
    linear.weight_function = [lambda weight: weight]


def rotated(linear):
    """Its weight as the quantiser stores one with heavy tails."""
    weight = linear.weight.dequantize()
    data, params = layouts.Int4Layout.quantize(weight, rotated=True, compute=layouts.COMPUTE_FP8)
    linear.weight = torch.nn.Parameter(layouts.QuantizedTensor(data, linear.weight._layout_cls, params), False)


@pytest.mark.parametrize("changed", ["w1", "w3"])
@pytest.mark.parametrize("change", [rotated, lora_beside, lora_on, bias_of_ones, watched])
def test_one_of_a_gates_weights_may_be_another(files_in_fp8, monkeypatch, change, changed):
    """The norm before them makes FP8 rows if both take them."""
    monkeypatch.setattr(fp8, "supported", lambda device: None)
    file, whole = files_in_fp8["int4"]
    ours = load_model(file, "int4-fp8").model.diffusion_model
    exact = load_model(whole, "fp32").model.diffusion_model
    for module in (ours, exact):
        if change is not rotated or module is ours:
            change(getattr(module.layers[1].feed_forward, changed))
    request = *request_of(1, 24, 28, 21), 21
    assert relative_error(ours._forward(*request), exact._forward(*request)) < FP8_OWN_ERROR


@pytest.mark.parametrize("change", [bypassed, with_bias, patched])
def test_a_product_with_something_else_in_it_is_scaled(files_in_fp8, fp8_rows, change):
    """A LoRA beside the weight or on it, or a bias: the layer gives whole values."""
    module = load_model(files_in_fp8["fp8"][0], "auto").model.diffusion_model
    request = *request_of(1, 24, 28, 21), 21
    whole = module._forward(*request)
    change(module.layers[1].feed_forward.w2)
    again = module._forward(*request)
    assert len(fp8_rows) == 2 * BLOCKS - 1
    assert relative_error(again, whole) < FP8_OWN_ERROR


def test_a_users_fp8_linear_makes_every_product(files_in_fp8, fp8_rows, monkeypatch):
    module, seen = load_model(files_in_fp8["fp8"][0], "auto").model.diffusion_model, []
    monkeypatch.setattr(fp8.FP8_LINEAR, "backends", dict(fp8.FP8_LINEAR.backends))

    def mine(x, x_scales, weight, *rest):
        seen.append(tuple(weight.shape))
        return fp8.linear_reference(x, x_scales, weight, *rest)

    fp8.FP8_LINEAR.register("mine", mine, lambda request: None, preferred=True)
    module._forward(*request_of(1, 24, 28, 21), 21)
    assert not fp8_rows and seen.count(W2) == BLOCKS


def test_attention_leaves_its_scales_if_it_is_to(files_in_fp8, fp8_rows, monkeypatch):
    """FP8 attention gives its last product FP8 rows."""
    file, whole = files_in_fp8["fp8"]
    x, timesteps, context = request_of(1, 24, 28, 21)
    exact = load_model(whole, "fp32").model.diffusion_model._forward(x, timesteps, context, 21)
    module, errors = load_model(file, "auto").model.diffusion_model, []
    for as_sums in (False, True):
        monkeypatch.setattr(forward, "OUT_AS_SUMS", as_sums)
        fp8_rows.clear()
        compute = forward.Compute(torch.float32, "triton-fp8")
        caption = forward.refine_caption(module, context, compute)
        table = forward.rotation_table(module, caption.shape[1], 12, 14, x.device)
        errors.append(relative_error(forward.denoise(module, compute, x, timesteps, caption, table), exact))
        assert fp8_rows == ([(256, 256), W2] if as_sums else [W2]) * BLOCKS
    assert errors[1] < 1.1 * errors[0] < FP8_OWN_ERROR
