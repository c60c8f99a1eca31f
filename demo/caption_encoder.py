"""A small Qwen3 text encoder; parameter names are those of transformers' Qwen3Model."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


def linear(channels_in: int, channels_out: int, bias: bool = False, std: float | None = None) -> nn.Linear:
    """A normally initialised linear layer; the default spread keeps activations at about unit size."""
    layer = nn.Linear(channels_in, channels_out, bias=bias)
    nn.init.normal_(layer.weight, std=0.7 * channels_in**-0.5 if std is None else std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class TextAttention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        hidden, self.head_dim = config["hidden_size"], config["head_dim"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = linear(hidden, self.heads * self.head_dim)
        self.k_proj = linear(hidden, self.kv_heads * self.head_dim)
        self.v_proj = linear(hidden, self.kv_heads * self.head_dim)
        self.o_proj = linear(self.heads * self.head_dim, hidden)
        self.q_norm = RMSNorm(self.head_dim, config["rms_norm_eps"])
        self.k_norm = RMSNorm(self.head_dim, config["rms_norm_eps"])

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(b, t, self.heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(b, t, self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        repeat = self.heads // self.kv_heads
        q = rotate_halves(q, cos, sin).to(v.dtype)
        k = rotate_halves(k, cos, sin).to(v.dtype).repeat_interleave(repeat, 1)
        h = F.scaled_dot_product_attention(q, k, v.repeat_interleave(repeat, 1), is_causal=True)
        return self.o_proj(h.transpose(1, 2).reshape(b, t, -1))


class TextFeedForward(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.gate_proj = linear(config["hidden_size"], config["intermediate_size"])
        self.up_proj = linear(config["hidden_size"], config["intermediate_size"])
        self.down_proj = linear(config["intermediate_size"], config["hidden_size"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.self_attn, self.mlp = TextAttention(config), TextFeedForward(config)
        self.input_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TextModel(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList([TextLayer(config) for _ in range(config["num_hidden_layers"])])
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The last layer and the norm exist for loaders of the family and are not run."""
        x = self.embed_tokens(ids)
        dim = self.config["head_dim"]
        inverse = self.config["rope_theta"] ** (-torch.arange(0, dim, 2, device=ids.device).float() / dim)
        phase = torch.arange(ids.shape[1], device=ids.device).float()[:, None] * inverse
        phase = torch.cat((phase, phase), -1)
        for layer in self.layers[:-1]:
            x = layer(x, phase.cos(), phase.sin())
        return x


class CaptionEncoder(nn.Module):
    """Token ids [B, T] → the condition [B, T, hidden size]."""

    def __init__(self, config: dict):
        super().__init__()
        self.config, self.model = config, TextModel(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids)
