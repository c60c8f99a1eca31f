"""What the loader does on GPUs of each generation, told by a mocked compute capability: nothing is computed there."""

from types import SimpleNamespace

import comfy.model_management as management
import comfy.utils
import pytest
import torch

from zimage_turbo.engine import layouts, model
from zimage_turbo.engine.checkpoint import Checkpoint
from zimage_turbo.kernels import fp8, registry
from zimage_turbo.kernels import int4 as int4_kernels
from zimage_turbo.tests.weights import small_transformer

CUDA = torch.device("cuda:0")
TURING, A100, AMPERE, ADA, HOPPER = (7, 5), (8, 0), (8, 6), (8, 9), (9, 0)
GPUS = [TURING, A100, AMPERE, ADA, HOPPER]
FP8_MODES = ("fp8", "int4-fp8")


def name_of(capability) -> str:
    return "sm_{}{}".format(*capability)


@pytest.fixture(params=GPUS, ids=name_of)
def capability(request, monkeypatch):
    """The capability of the GPU that this machine now seems to have, with 24 GiB."""
    major, minor = request.param
    properties = SimpleNamespace(name="Some GPU", major=major, minor=minor, total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: properties.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CUDA.index)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # torch emulates it on older ones
    monkeypatch.setattr(management, "cpu_state", management.CPUState.GPU)
    monkeypatch.setattr(management, "get_torch_device", lambda: CUDA)
    monkeypatch.setattr(management, "get_total_memory", lambda device=None: properties.total_memory)
    registry._capability.cache_clear()
    yield request.param
    registry._capability.cache_clear()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model in bf16, and in our two formats, as they lie on disk."""
    folder = tmp_path_factory.mktemp("weights")
    made = {"bf16": small_transformer(folder / "bf16.safetensors")}
    with torch.inference_mode():
        for form in ("int4", "fp8"):
            made[form] = folder / f"{form}.safetensors"
            whole = Checkpoint.read(made["bf16"])
            comfy.utils.save_torch_file(model.quantiser.quantised(whole, form, torch.device("cpu")).weights, made[form])
    return made


def loaded(file, precision: str = "auto"):
    """The model on the GPU that is not there: the host moves its weights only when it samples."""
    return model.load_model(file, precision, CUDA)


def qkv_of(patcher) -> torch.Tensor:
    return patcher.model.diffusion_model.layers[0].attention.qkv.weight


@pytest.mark.parametrize("precision", model.PRECISIONS)
def test_refuses_only_fp8_and_only_before_ada(capability, precision):
    if precision in FP8_MODES and capability < ADA:
        with pytest.raises(ValueError) as caught:
            model.check_precision(precision, CUDA)
        message = str(caught.value)
        assert message.startswith(f"precision '{precision}' cannot be used on cuda:0: ")
        assert "compute capability 8.9 or newer" in message and "Some GPU has {}.{}".format(*capability) in message
    else:
        model.check_precision(precision, CUDA)


@pytest.mark.parametrize("capability", [TURING, A100, AMPERE], ids=name_of, indirect=True)
@pytest.mark.parametrize("precision", FP8_MODES)
def test_suggests_what_the_gpu_computes_itself(capability, precision, files):
    """None that is refused in its turn; and the host computes the float one as held, without casting to fp32."""
    with pytest.raises(ValueError) as caught:
        model.check_precision(precision, CUDA)
    suggested = str(caught.value).rpartition("Choose ")[2].rstrip(".").replace(" or ", ", ").split(", ")
    names = [name.strip("'") for name in suggested]
    assert names == ["auto", "int4", "fp16" if capability == TURING else "bf16"]
    for name in names:
        model.check_precision(name, CUDA)
    whole = model.FLOATS[names[-1]]
    held = loaded(files["bf16"], names[-1])
    assert qkv_of(held).dtype == whole and held.model.manual_cast_dtype is None


def test_a_processor_is_offered_what_it_computes_in():
    with pytest.raises(ValueError, match=r"the device is cpu\. Choose 'auto', 'int4' or 'fp32'"):
        model.check_precision("fp8", torch.device("cpu"))


def test_auto_multiplies_an_int4_file_in_what_the_gpu_has(capability, files):
    expected = layouts.COMPUTE_FP8 if capability >= ADA else layouts.COMPUTE_16
    weight = qkv_of(loaded(files["int4"]))
    assert weight._layout_cls == layouts.Int4Layout.__name__
    assert weight._params.compute == expected


def test_an_fp8_file_stays_small_and_is_multiplied_out_where_it_must_be(capability, files):
    """`multiply` takes FP8 products exactly on those GPUs for which 'fp8' is not refused."""
    weight = qkv_of(loaded(files["fp8"]))
    assert weight._layout_cls == layouts.Fp8Layout.__name__ and weight._qdata.dtype == torch.float8_e4m3fn
    assert (fp8.supported(CUDA) is None) == (capability >= ADA)
    if capability < ADA:
        with pytest.raises(ValueError, match=r"compute capability 8\.9"):
            loaded(files["fp8"], "fp8")


@pytest.mark.parametrize("form", ["int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_without_fp8_products_are_those_of_the_weights_multiplied_out(monkeypatch, files, form, dtype):
    """What a GPU before Ada computes, here on a processor, which lacks FP8 as well."""
    patcher = model.load_model(files[form], "auto", torch.device("cpu"))
    weight = qkv_of(patcher)
    monkeypatch.setattr(fp8, "quantise_rows", lambda *_: pytest.fail("activations were rounded to FP8"))
    monkeypatch.setattr(int4_kernels, "linear_fp8", lambda *_: pytest.fail("activations were rounded to FP8"))
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = x.double() @ weight.dequantize().double().T
    reference = x @ weight.dequantize().to(dtype).T
    limit = 2 * (reference.double() - exact).abs().max() + 1e-6
    assert (layouts.multiply(x, weight).double() - exact).abs().max() <= limit


def test_auto_holds_a_whole_file_in_what_the_gpu_computes(capability, files):
    """A Turing GPU: fp32, since the host has no fp16 for a file whose norms do not show that it bears that."""
    expected = torch.float32 if capability == TURING else torch.bfloat16
    patcher = loaded(files["bf16"])
    assert (patcher.model.manual_cast_dtype or qkv_of(patcher).dtype) == expected


@pytest.mark.parametrize("attention", model.ATTENTIONS)
def test_attention_is_refused_with_a_reason(capability, attention):
    """'auto' and torch's own always run; kernels for 16 bit begin with Ampere, `triton-fp8` with Ada."""
    least = {"auto": (0, 0), "sdpa": (0, 0), "triton-fp8": ADA}.get(attention, A100)
    request = (attention, CUDA, torch.float16)
    if capability < least:
        with pytest.raises(ValueError, match=r"compute capability 8\.[09]") as caught:
            model.check_attention(*request)
        assert "'auto' or: " in str(caught.value) and "sdpa" in str(caught.value)
    elif attention in ("auto", "sdpa", "triton"):  # the others ask what this torch is built with
        model.check_attention(*request)
