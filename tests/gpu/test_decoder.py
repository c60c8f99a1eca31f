"""The fast VAE decode on a GPU at the official widths: as exact as the host's, in the memory that it asks for."""

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder
from safetensors.torch import save_file

from zimage_turbo.benchmarks import server_weights
from zimage_turbo.engine import decoder, vae
from zimage_turbo.tests.comparison import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "ae.safetensors"
    save_file({name: weight.cpu() for name, weight in server_weights.vae().items()}, path)
    return path


@pytest.fixture
def ours(file):
    """On the GPU, in the host's own choice of type."""
    made = vae.load_vae(file)
    comfy.model_management.load_models_gpu([made.patcher], force_full_load=True)
    return made


def latent(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(height + width))


def in_fp32(module: Decoder, z: torch.Tensor) -> torch.Tensor:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.cat([Decoder.forward(module.float(), picture.float()) for picture in z.split(1)])


@pytest.mark.parametrize("size", [(1, 128, 128), (2, 65, 43), (4, 64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_as_exact_as_the_host(ours, size, dtype):
    module = ours.first_stage_model.decoder.to(dtype)
    z = latent(*size).to("cuda", dtype)
    fast, again, theirs = module(z), module(z), Decoder.forward(module, z)
    assert dict(module.forwards) == {decoder.FAST: 2}
    assert torch.equal(fast, again) and fast.is_contiguous()
    exact = in_fp32(module, z)
    own_error, error = relative_error(theirs.float(), exact), relative_error(fast.float(), exact)
    print(f"{dtype} {size}: host {own_error:.2e}, ours {error:.2e}")
    assert error <= 2 * own_error


def test_fp32(ours):
    module = ours.first_stage_model.decoder.float()
    z = latent(1, 64, 48).cuda()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert relative_error(module(z), Decoder.forward(module, z)) < 1e-4


@pytest.mark.parametrize("size", [(1, 64, 64), (1, 128, 128), (1, 192, 128)], ids=str)
def test_a_decode_takes_no_more_than_it_asks_for(ours, size):
    z = latent(*size).to("cuda", ours.vae_dtype)
    module = ours.first_stage_model.decoder
    module(z)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    module(z)
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    asked = ours.memory_used_decode(z.shape, z.dtype)
    print(f"{size}: {used / 2**20:.0f} MiB of {asked / 2**20:.0f}")
    assert used <= asked
    assert torch.cuda.memory_allocated() <= before


def test_the_vae_decodes_whole_and_tiled(ours, file):
    z = latent(2, 48, 40)
    host = comfy.sd.VAE(sd=dict(vae.Checkpoint.read(file).weights))
    for method in ("decode", "decode_tiled"):
        assert (getattr(ours, method)(z) - getattr(host, method)(z)).abs().mean() < 0.01
    assert set(ours.first_stage_model.decoder.forwards) == {decoder.FAST}


def test_offloaded_weights_give_the_same_picture(file):
    """Convolutions are then cast from main memory at every call."""
    z = latent(1, 64, 64)
    made = vae.load_vae(file)
    resident = made.decode(z)
    comfy.model_management.unload_all_models()
    made.patcher.load(made.device, lowvram_model_memory=2**20)
    module = made.first_stage_model.decoder
    assert module.mid.block_1.conv1.weight.device.type == "cpu"
    offloaded = made.first_stage_model.decode(z.to("cuda", made.vae_dtype))
    assert set(module.forwards) == {decoder.FAST}
    offloaded = made.process_output(offloaded.float().cpu()).movedim(1, -1)
    assert (offloaded - resident).abs().max() < 0.02
    made.patcher.detach()
