"""Caption encoder and denoiser as one trainable module, and the sampler that turns prompts into pictures."""

from itertools import pairwise

import torch
import torch.nn as nn
from tokenizers import Tokenizer

from .autoencoder import Autoencoder
from .caption_encoder import CaptionEncoder
from .configs import PAD_MULTIPLE, SIGMAS
from .denoiser import Denoiser
from .tokenization import encode


class Model(nn.Module):
    def __init__(self, text_encoder: CaptionEncoder, transformer: Denoiser):
        super().__init__()
        self.text_encoder, self.transformer = text_encoder, transformer

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Noisy latents [B, 16, H, W], noise levels [B], token ids [B, T], prompt lengths [B] → noise minus picture."""
        return self.transformer(x, sigma, self.text_encoder(ids), length)


@torch.no_grad()
def sample(model: Model, noise: torch.Tensor, ids: torch.Tensor, length: torch.Tensor, sigmas=SIGMAS) -> torch.Tensor:
    """Euler steps from noise [B, 16, H, W] to latents, without guidance: one evaluation a step."""
    x, context = noise, model.text_encoder(ids)
    for now, after in pairwise(sigmas):
        sigma = torch.full((len(x),), now, device=x.device)
        x = x + (after - now) * model.transformer(x, sigma, context, length).float()
    return x


def pad_prompts(tokenizer: Tokenizer, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] with T a multiple of 32, and lengths [B]."""
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, rows))
    width = longest + -longest % PAD_MULTIPLE
    return torch.tensor([row + [0] * (width - len(row)) for row in rows]), torch.tensor([len(row) for row in rows])


def seeded_noise(seed: int, width: int, height: int) -> torch.Tensor:
    return torch.randn(16, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))


def draw(
    model: Model,
    vae: Autoencoder,
    tokenizer: Tokenizer,
    prompts: list[str],
    seeds: list[int],
    sizes: list[tuple[int, int]],
    batch: int = 16,
) -> list[torch.Tensor]:
    """One picture [H, W, 3] in 0..1 per prompt; `sizes` are (width, height) in multiples of 16.

    Prompts run together only if size and padded length agree, as a host pads each prompt to its own multiple of 32.
    """
    device = next(model.parameters()).device
    groups: dict[tuple, list[int]] = {}
    for i, (prompt, size) in enumerate(zip(prompts, sizes, strict=True)):
        groups.setdefault((size, -(-len(encode(tokenizer, prompt)) // PAD_MULTIPLE)), []).append(i)
    pictures: list[torch.Tensor | None] = [None] * len(prompts)
    for (size, _), members in groups.items():
        for part in (members[k : k + batch] for k in range(0, len(members), batch)):
            ids, length = pad_prompts(tokenizer, [prompts[i] for i in part])
            noise = torch.stack([seeded_noise(seeds[i], *size) for i in part])
            with torch.no_grad():
                latents = sample(model, noise.to(device), ids.to(device), length.to(device))
                images = (vae.pictures(latents) + 1) / 2
            for i, image in zip(part, images.permute(0, 2, 3, 1).cpu(), strict=True):
                pictures[i] = image
    return pictures
