"""A narrow autoencoder of the Flux family; parameter names are those of diffusers' AutoencoderKL."""

from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

GROUPS, EPS = 32, 1e-6


class Resnet(nn.Module):
    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, channels_in, eps=EPS)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, channels_out, eps=EPS)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(GROUPS, channels, eps=EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (project(h).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution except at the last level."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, resample: str, last: bool):
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.resnets = nn.ModuleList([Resnet(a, b) for a, b in pairwise(widths)])
        self.resample = None if last else resample
        if not last:
            kind = {"downsamplers": Downsample, "upsamplers": Upsample}[resample]
            setattr(self, resample, nn.ModuleList([kind(channels_out)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        return getattr(self, self.resample)[0](x) if self.resample else x


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(channels, channels), Resnet(channels, channels)])
        self.attentions = nn.ModuleList([SpatialAttention(channels)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """[B, 3, H, W] in -1..1 → [B, 2 * latent channels, H / 8, W / 8]: means, then log variances."""

    def __init__(self, config: dict):
        super().__init__()
        widths = config["block_out_channels"]
        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                Level([widths[0], *widths][i], width, config["layers_per_block"], "downsamplers", i == len(widths) - 1)
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = Middle(widths[-1])
        self.conv_norm_out = nn.GroupNorm(GROUPS, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config["latent_channels"], 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))


class Decoder(nn.Module):
    """[B, latent channels, H / 8, W / 8] → [B, 3, H, W] in about -1..1."""

    def __init__(self, config: dict):
        super().__init__()
        widths = config["block_out_channels"][::-1]
        self.conv_in = nn.Conv2d(config["latent_channels"], widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0])
        self.up_blocks = nn.ModuleList(
            [
                Level(
                    [widths[0], *widths][i], width, config["layers_per_block"] + 1, "upsamplers", i == len(widths) - 1
                )
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = nn.GroupNorm(GROUPS, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config["out_channels"], 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class Autoencoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in -1..1 → the transformer's latents [B, 16, H / 8, W / 8], about unit variance."""
        mean = self.encoder(pictures).float().chunk(2, 1)[0]
        return (mean - self.config["shift_factor"]) * self.config["scaling_factor"]

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        """The transformer's latents → [B, 3, H, W] clamped to -1..1."""
        z = latents / self.config["scaling_factor"] + self.config["shift_factor"]
        return self.decoder(z).float().clamp(-1, 1)
