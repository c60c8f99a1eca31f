"""Writes the weight files of the server benchmark: full-size random ones, or the demo in the host's single-file form.

Run by server.py in a process of its own, so that no CUDA context stays behind; by hand:
ZIMAGE_COMFYUI=<tree> python benchmarks/server_weights.py FOLDER [--demo]
Random weights say how fast a model is, not how pretty. A file that is there already is left as it is.
"""

import argparse
import sys
import types
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent
package = types.ModuleType("zimage_turbo")
package.__path__ = [str(PACK)]
sys.modules["zimage_turbo"] = package

from zimage_turbo.benchmarks import stock_formats  # noqa: E402
from zimage_turbo.launcher.inside import host  # noqa: E402
from zimage_turbo.launcher.models import OFFICIAL_FILES  # noqa: E402

LOUD_EVERY, LOUDNESS = 480, 8
FLUX_VAE = {
    "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where diffusion_models, text_encoders and vae are made")
    parser.add_argument("--demo", action="store_true", help="the demo's weights instead of random ones")
    parser.add_argument(
        "--stock-formats", type=Path, metavar="FILE", help="only the host's own low-bit forms of this diffusion model"
    )
    arguments = parser.parse_args()
    host.enter(host.tree(), [])
    if arguments.stock_formats:
        for form in stock_formats.FORMATS:
            stock_formats.write(arguments.stock_formats, arguments.folder / stock_formats.file_name(form), form)
        return
    makers = (demo_denoiser, demo_encoder, demo_vae) if arguments.demo else (denoiser, text_encoder, vae)
    for maker, (_, name, kind, _) in zip(makers, OFFICIAL_FILES, strict=True):
        path = arguments.folder / kind / name
        if not path.is_file():
            write(maker(), path)


def write(weights: dict, path: Path) -> None:
    """A safetensors file that appears under its name only when it is whole."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: weight.contiguous() for name, weight in weights.items()}, partial, metadata={"format": "pt"})
    partial.replace(path)
    print(f"wrote {path.name}, {path.stat().st_size / 1e9:.2f} GB", flush=True)


def denoiser(layers: int = 30) -> dict:
    """The diffusion model, 12.3 GB at 30 layers: gains near one, every 480th column eight times as loud as the others.

    The loud columns are what makes low precision hard in trained models.
    """
    import comfy.ops
    import torch
    from comfy.ldm.lumina.model import NextDiT

    from zimage_turbo.tests.weights import FULL

    made = NextDiT(
        **FULL, n_layers=layers, device="meta", operations=comfy.ops.disable_weight_init, dtype=torch.float32
    )
    weights = random_weights(made)
    for weight in weights.values():
        if weight.ndim == 2 and weight.shape[1] == FULL["dim"]:
            weight[:, ::LOUD_EVERY] *= LOUDNESS
    return weights


def text_encoder(sizes: dict | None = None) -> dict:
    """Qwen3-4B, 8 GB; `sizes` overrides the host's settings of it."""
    import comfy.ops
    import comfy.text_encoders.llama as llama
    import torch

    return random_weights(llama.Qwen3_4B(sizes or {}, torch.float32, "meta", comfy.ops.disable_weight_init))


def vae() -> dict:
    """The Flux VAE; its convolutions keep the size of what goes through, so that pictures have contrast."""
    import torch
    from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder

    with torch.device("meta"):
        return random_weights(torch.nn.ModuleDict({"encoder": Encoder(**FLUX_VAE), "decoder": Decoder(**FLUX_VAE)}))


def random_weights(module) -> dict:
    """bf16 noise in the shapes of a module on the meta device, on the GPU if there is one.

    Gains of norms are 1 ± 0.1, convolutions have a standard deviation that keeps the variance, all others one of 0.02.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    weights = {}
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, device=device, dtype=torch.bfloat16)
        if value.ndim == 1 and name.endswith("weight"):
            noise.mul_(0.1).add_(1)
        else:
            noise *= value[0].numel() ** -0.5 if value.ndim == 4 else 0.02
        weights[name] = noise
    return weights


def demo_denoiser() -> dict:
    from zimage_turbo.engine import formats

    return _expanded(formats.with_comfy_names(_demo_part("transformer")))


def demo_encoder() -> dict:
    return _expanded(_demo_part("text_encoder"))


def demo_vae() -> dict:
    import comfy.diffusers_convert

    return comfy.diffusers_convert.convert_vae_state_dict(dict(_demo_part("vae").weights))


def _demo_part(name: str):
    from zimage_turbo.engine.catalogue import DEMO_FOLDER
    from zimage_turbo.engine.checkpoint import Checkpoint

    return Checkpoint.read(DEMO_FOLDER / name)


def _expanded(checkpoint) -> dict:
    import torch

    from zimage_turbo.engine import formats

    return formats.expanded(checkpoint, torch.bfloat16).weights


if __name__ == "__main__":
    main()
