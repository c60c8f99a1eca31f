"""A small Z-Image transformer; parameter names are those of diffusers' ZImageTransformer2DModel."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .caption_encoder import RMSNorm, linear
from .configs import PAD_MULTIPLE

QK_EPS = torch.finfo(torch.float32).eps
TIME_WIDTH = 256
PATCH = 2


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Neighbouring channels turn together. x: [B, T, heads, D]; cos, sin: [T, 1, D / 2]."""
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1)
    return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([linear(dim, dim)])
        self.norm_q, self.norm_k = RMSNorm(dim // heads, QK_EPS), RMSNorm(dim // heads, QK_EPS)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        fused = torch.cat((self.to_q.weight, self.to_k.weight, self.to_v.weight))
        q, k, v = F.linear(x, fused).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q = rotate_pairs(self.norm_q(q), cos, sin).to(v.dtype)
        k = rotate_pairs(self.norm_k(k), cos, sin).to(v.dtype)
        h = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.to_out[0](h.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w2, self.w3 = linear(dim, hidden), linear(hidden, dim), linear(dim, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        dim = config["dim"]
        self.attention = Attention(dim, config["n_heads"])
        self.feed_forward = FeedForward(dim, config["ffn_hidden_dim"])
        for name in ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2"):
            setattr(self, name, RMSNorm(dim, config["norm_eps"]))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention_norm2(self.attention(self.attention_norm1(x), cos, sin))
        return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))


class ModulatedBlock(Block):
    def __init__(self, config: dict):
        super().__init__(config)
        dim = config["dim"]
        self.adaLN_modulation = nn.Sequential(linear(TIME_WIDTH, 4 * dim, bias=True, std=0.0))
        with torch.no_grad():  # gates that start a little open train faster than closed ones
            _, attention_gate, _, ffn_gate = self.adaLN_modulation[0].bias.chunk(4)
            attention_gate.fill_(0.25)
            ffn_gate.fill_(0.25)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale1, gate1, scale2, gate2 = self.adaLN_modulation(time).unsqueeze(1).chunk(4, -1)
        h = self.attention(self.attention_norm1(x) * (1 + scale1), cos, sin)
        x = x + gate1.tanh() * self.attention_norm2(h)
        h = self.feed_forward(self.ffn_norm1(x) * (1 + scale2))
        return x + gate2.tanh() * self.ffn_norm2(h)


class TimeEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(linear(256, width, bias=True), nn.SiLU(), linear(width, TIME_WIDTH, bias=True))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device).float() / 128)
        phase = t.float()[:, None] * frequency
        return self.mlp(torch.cat((phase.cos(), phase.sin()), -1))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, channels_out: int):
        super().__init__()
        self.linear = linear(dim, channels_out, bias=True, std=0.0)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(TIME_WIDTH, dim, bias=True, std=0.0))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale = 1 + self.adaLN_modulation(time).float().unsqueeze(1)
        return self.linear(F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * scale)


class Denoiser(nn.Module):
    """Predicts noise minus picture from a noisy latent, its noise level and the text condition."""

    def __init__(self, config: dict):
        super().__init__()
        self.config, self.phases = config, {}
        dim, patch_width = config["dim"], PATCH * PATCH * config["in_channels"]
        self.all_x_embedder = nn.ModuleDict({"2-1": linear(patch_width, dim, bias=True)})
        self.noise_refiner = nn.ModuleList([ModulatedBlock(config) for _ in range(config["n_refiner_layers"])])
        self.context_refiner = nn.ModuleList([Block(config) for _ in range(config["n_refiner_layers"])])
        self.t_embedder = TimeEmbedder(dim)
        self.cap_embedder = nn.Sequential(
            RMSNorm(config["cap_feat_dim"], config["norm_eps"]), linear(config["cap_feat_dim"], dim, bias=True)
        )
        self.layers = nn.ModuleList([ModulatedBlock(config) for _ in range(config["n_layers"])])
        self.all_final_layer = nn.ModuleDict({"2-1": FinalLayer(dim, patch_width)})
        self.x_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.cap_pad_token = nn.Parameter(torch.randn(1, dim) * 0.5)

    def blocks(self) -> list[nn.Module]:
        return [*self.context_refiner, *self.noise_refiner, *self.layers]

    def rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [T, 3] → cosines and sines [T, 1, head dim / 2]."""
        parts = []
        for axis, dim in enumerate(self.config["axes_dims"]):
            steps = torch.arange(0, dim, 2, device=positions.device).double()
            parts.append(positions[:, axis, None].double() * self.config["rope_theta"] ** (-steps / dim))
        phase = torch.cat(parts, -1)[:, None]
        return phase.cos().float(), phase.sin().float()

    def rotations(self, words: int, rows: int, columns: int, device: torch.device) -> tuple:
        """Rotations of caption, picture and both. Padding tokens of the picture stand at (0, 0, 0)."""
        key = (words, rows, columns, device)
        if key not in self.phases:
            caption = torch.zeros(words, 3, device=device)
            caption[:, 0] = torch.arange(words, device=device) + 1
            picture = torch.zeros(rows * columns + -rows * columns % PAD_MULTIPLE, 3, device=device)
            picture[: rows * columns, 0] = words + 1
            picture[: rows * columns, 1] = torch.arange(rows, device=device).repeat_interleave(columns)
            picture[: rows * columns, 2] = torch.arange(columns, device=device).repeat(rows)
            self.phases[key] = [self.rotation(p) for p in (caption, picture, torch.cat((caption, picture)))]
        return self.phases[key]

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, length: torch.Tensor):
        """x: [B, 16, H, W]; sigma, length: [B]; context: [B, T, C] with T a multiple of 32 → [B, 16, H, W].

        Rows of the context from `length` on are replaced by the learned padding token.
        """
        b, channels, height, width = x.shape
        rows, columns, words = height // PATCH, width // PATCH, context.shape[1]
        time = self.t_embedder((1.0 - sigma) * self.config["t_scale"])
        caption_turn, picture_turn, both_turn = self.rotations(words, rows, columns, x.device)
        caption = self.cap_embedder(context)
        real = torch.arange(words, device=x.device)[None] < length[:, None]
        caption = torch.where(real.unsqueeze(-1), caption, self.cap_pad_token.to(caption.dtype))
        for block in self.context_refiner:
            caption = block(caption, *caption_turn)
        patches = x.view(b, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        picture = self.all_x_embedder["2-1"](patches)
        padding = self.x_pad_token.to(picture.dtype).expand(b, -rows * columns % PAD_MULTIPLE, -1)
        picture = torch.cat((picture, padding), 1)
        for block in self.noise_refiner:
            picture = block(picture, *picture_turn, time)
        both = torch.cat((caption, picture), 1)
        for block in self.layers:
            both = block(both, *both_turn, time)
        out = self.all_final_layer["2-1"](both[:, words : words + rows * columns], time)
        out = out.view(b, rows, columns, PATCH, PATCH, channels).permute(0, 5, 1, 3, 2, 4)
        return -out.reshape(b, channels, height, width)
