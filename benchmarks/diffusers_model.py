"""The rival from diffusers: its Z-Image transformer with the host's weights under its own names, called as it calls it.

diffusers computes the same function in another order (picture before caption, q, k and v apart), so the results agree
within rounding.
"""

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator

EMBEDDER, FINAL_LAYER = "all_x_embedder.2-1", "all_final_layer.2-1"  # of patch size 2 in space and 1 in time
RENAMED = (
    ("x_embedder.", f"{EMBEDDER}."),
    ("final_layer.", f"{FINAL_LAYER}."),
    (".attention.out.", ".attention.to_out.0."),
    (".attention.q_norm.", ".attention.norm_q."),
    (".attention.k_norm.", ".attention.norm_k."),
)
QKV = ".attention.qkv."
CUDNN_FIRST = ((9, 0), (10, 0))  # compute capabilities of GPUs on which torch by itself attends by cuDNN


def installed() -> bool:
    return importlib.util.find_spec("diffusers") is not None


def version() -> str:
    import diffusers

    return diffusers.__version__


@contextlib.contextmanager
def attention_of_its_own() -> Iterator[None]:
    """Attention as in a process without the host, whose forward leaves torch with flash attention first: on Hopper that
    takes nearly twice as long."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if torch.cuda.get_device_capability() not in CUDNN_FIRST:
        yield
        return
    order = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    with sdpa_kernel([getattr(SDPBackend, name) for name in order], set_priority=True):
        yield


def build(weights: Iterable[tuple[str, "torch.Tensor"]], **sizes):  # noqa: F821
    """The transformer around the weights where they lie. sizes: its settings where not the official ones."""
    import torch
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        module = ZImageTransformer2DModel(**sizes)
    module.load_state_dict(dict(renamed(weights)), assign=True)
    return module.eval()


def renamed(weights: Iterable[tuple[str, "torch.Tensor"]]) -> Iterator[tuple[str, "torch.Tensor"]]:  # noqa: F821
    """The host's names in, diffusers' out; the joint q, k and v come apart as views."""
    for name, weight in weights:
        if QKV in name:
            for letter, part in zip("qkv", weight.chunk(3), strict=True):
                yield name.replace(QKV, f".attention.to_{letter}."), part
            continue
        for ours, theirs in RENAMED:
            if name.startswith(ours) or (ours.startswith(".") and ours in name):
                name = name.replace(ours, theirs)
        yield name, weight


def forward(module, x: "torch.Tensor", timesteps: "torch.Tensor", context: "torch.Tensor") -> "torch.Tensor":  # noqa: F821
    """What the host's forward gives for the same arguments: x [B, 16, H, W], timesteps [B] = σ, context [B, T, C].

    Its pipeline hands over lists of one picture and one prompt each, the time as 1 - σ, and turns the sign itself.
    """
    import torch

    pictures = list(x.unsqueeze(2).unbind(0))
    found = module(pictures, 1 - timesteps, list(context.unbind(0)), return_dict=False)[0]
    return -torch.stack(found).squeeze(2)
