"""The pack's nodes called one after the other, as the executor calls them, in this process."""

import gc
from pathlib import Path

from .contestants import STEPS, choice


class Pipeline:
    """The loader's three models. Every method is one node, and runs under torch.inference_mode()."""

    def __init__(self, files: dict[str, str], precision: str, cache: bool, attention: str = "auto"):
        """files: as `weight_files.names` gives them, of a folder that `register` knows; empty for the demo."""
        from zimage_turbo.nodes.loader import ZImageTurboLoader

        loaded = ZImageTurboLoader.execute(
            **choice(files), precision=precision, device="auto", attention=attention, cache_quantised=cache
        )
        self.model, self.clip, self.vae = loaded.args

    def encode(self, text: str) -> list:
        from zimage_turbo.nodes.text_encoder import ZImageTurboTextEncode

        return ZImageTurboTextEncode.execute(self.clip, text)[0]

    def sample(self, positive: list, seed: int, width: int, height: int) -> dict:
        from zimage_turbo.nodes.sampler import ZImageTurboSampler

        return ZImageTurboSampler.execute(self.model, positive, seed, STEPS, 1.0, width, height, 1)[0]

    def decode(self, latent: dict) -> "torch.Tensor":  # noqa: F821
        """[1, height, width, 3] in 0..1."""
        return self.vae.decode(latent["samples"])

    def patchers(self) -> dict:
        """The host's patcher of each of the three models."""
        return {"diffusion model": self.model, "text encoder": self.clip.patcher, "VAE": self.vae.patcher}

    def close(self) -> None:
        """Give all memory back."""
        import comfy.model_management
        import torch

        comfy.model_management.unload_all_models()
        del self.model, self.clip, self.vae
        gc.collect()
        torch.cuda.empty_cache()


def register(folder: Path, kinds: tuple[str, ...]) -> None:
    """Let the host look for files of these kinds below a models folder too."""
    import folder_paths

    for kind in kinds:
        folder_paths.add_model_folder_path(kind, str(folder / kind))


def held(patcher) -> tuple[int, int]:
    """Bytes of a model's weights that lie on a GPU, and of all; a quantised weight is its parts."""
    from comfy.quant_ops import QuantizedTensor

    on_gpu = total = 0
    for weight in (*patcher.model.parameters(), *patcher.model.buffers()):
        parts = weight.layout_cls.get_plain_tensors(weight) if isinstance(weight, QuantizedTensor) else (weight,)
        for part in parts:
            total += part.nbytes
            on_gpu += part.nbytes * part.is_cuda
    return on_gpu, total
