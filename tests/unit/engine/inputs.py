"""What tests ask small models for."""

import torch


def request_of(batch: int, height: int, width: int, words: int) -> tuple[torch.Tensor, ...]:
    """Latents, times and a text, the same for the same sizes."""
    generator = torch.Generator().manual_seed(height + words)
    return (
        torch.randn(batch, 16, height, width, generator=generator),
        torch.rand(batch, generator=generator),
        torch.randn(batch, words, 256, generator=generator),
    )
