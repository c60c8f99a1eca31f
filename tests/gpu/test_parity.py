"""Our loader and sampler against the stock ones on a GPU, at the official width, depth and size."""

import folder_paths
import pytest
import torch
from comfy.ldm.lumina.model import NextDiT
from safetensors.torch import save_file

from zimage_turbo.engine import model, ode, sampling
from zimage_turbo.tests.comparison import relative_error, stock_sample
from zimage_turbo.tests.weights import FULL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 40 * 2**30,
        reason="the fp32 reference takes 25 GB of GPU memory",
    ),
]


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """All 30 layers of random bf16 weights, 12.3 GB; gains near one, some channels loud as in trained models."""
    import comfy.ops

    torch.cuda.manual_seed(0)
    module = NextDiT(**FULL, n_layers=30, device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
    weights = {}
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, device="cuda", dtype=torch.bfloat16)
        if "norm" in name and name.endswith("weight"):
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.02
            if value.ndim == 2 and value.shape[1] == FULL["dim"]:
                noise[:, ::480] *= 8
        weights[name] = noise.cpu()
    folder = tmp_path_factory.mktemp("diffusion_models")
    folder_paths.add_model_folder_path("diffusion_models", str(folder))
    save_file(weights, folder / "z_image_random_bf16.safetensors")
    return folder / "z_image_random_bf16.safetensors"


def test_full_size_at_1024(full_size):
    """Within twice the error of bf16 itself, which is the stock bf16 result against the stock fp32 one."""
    import comfy.model_management
    import comfy.sd

    positive = [[torch.randn(1, 60, 2560, generator=torch.Generator().manual_seed(5)), {}]]
    latent = {"samples": torch.zeros(1, 16, 128, 128)}

    def stock(dtype):
        patcher = comfy.sd.load_diffusion_model(str(full_size), {"dtype": dtype})
        result = stock_sample(patcher, positive, latent, 11).float().cpu()
        comfy.model_management.unload_all_models()
        return result

    exact, theirs = stock(torch.float32), stock(torch.bfloat16)
    patcher = model.load_model(full_size, "bf16")
    ours = sampling.sample(patcher, positive, latent, 11, ode.sigmas())["samples"].float().cpu()
    own_error = relative_error(theirs, exact)
    print(
        f"bf16 against fp32: stock {own_error:.2e}, ours {relative_error(ours, exact):.2e}; "
        f"ours against stock {relative_error(ours, theirs):.2e}"
    )
    assert 0 < own_error < 0.5
    assert relative_error(ours, exact) <= 2 * own_error
    assert relative_error(ours, theirs) <= 2 * own_error


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32"])
def test_demo_in_every_precision(precision):
    """The demo on the GPU against the stock sampler on the same MODEL."""
    from zimage_turbo.engine import catalogue, loading, text

    patcher, clip, vae = loading.load(catalogue.resolve("demo", "auto", "auto"), precision, torch.device("cuda:0"))
    positive = text.encode(clip, "a large red circle in the center, white background")
    latent = sampling.empty_latent(patcher, 0, 0, 2)
    ours = sampling.sample(patcher, positive, latent, 3, ode.sigmas())["samples"]
    assert torch.equal(ours, stock_sample(patcher, positive, latent, 3))
    centre = vae.decode(ours)[0, 118:138, 118:138].mean((0, 1))
    assert centre[0] > 0.6 and centre[1:].max() < 0.4


def test_device_cpu_on_a_machine_with_a_gpu():
    from zimage_turbo.engine import catalogue, loading, text

    patcher, clip, _ = loading.load(catalogue.resolve("demo", "auto", "auto"), "auto", torch.device("cpu"))
    assert patcher.load_device.type == "cpu" and clip.patcher.load_device.type == "cpu"
    latent = sampling.empty_latent(patcher, 0, 0, 1)
    assert torch.isfinite(
        sampling.sample(patcher, text.encode(clip, "a star"), latent, 3, ode.sigmas())["samples"]
    ).all()
