"""Drawing with the pack's own nodes, called as the executor calls them."""

from collections.abc import Callable

import torch

from zimage_turbo.nodes.loader import ZImageTurboLoader
from zimage_turbo.nodes.sampler import ZImageTurboSampler
from zimage_turbo.nodes.text_encoder import ZImageTurboTextEncode


def node_draw(
    precision: str = "auto", attention: str = "auto"
) -> Callable[[list[str], list[int], list[tuple[int, int]]], list[torch.Tensor]]:
    """draw(prompts, seeds, sizes (width, height)) with the demo at 8 NFE; pictures [height, width, 3] in 0..1."""
    model, clip, vae = ZImageTurboLoader.execute("demo", "auto", "auto", precision, "auto", attention).args

    def draw(prompts, seeds, sizes):
        pictures = []
        for prompt, seed, (width, height) in zip(prompts, seeds, sizes, strict=True):
            positive = ZImageTurboTextEncode.execute(clip, prompt)[0]
            latent = ZImageTurboSampler.execute(model, positive, seed, 8, 1.0, width, height, 1)[0]
            pictures.append(vae.decode(latent["samples"])[0].float().cpu())
        return pictures

    return draw
