"""What ranks do for multi_gpu.py alone: exchange without computing. A module that `Setup.operations` may name."""

import time
from collections.abc import Callable

import comfy.model_management as management
import torch

from ..engine import duties, forward, measured
from ..engine.group import wire
from ..engine.group.jobs import Job
from ..engine.group.worker import Rank
from ..engine.sequence import Exchange

CALLS = 5


def exchange(rank: Rank, job: Job) -> wire.Tree:
    """Seconds that the exchanges of one evaluation take with nothing computed between them, packing included.

    request: key; members, the numbers of ranks that have evaluated a latent of this shape together, all of which are
    asked; shape of a latent [1, 16, h, w]; tokens of a prompt.
    """
    given, model = job.request, duties.kept(rank, job.request["key"]).model
    management.load_models_gpu([model])
    module, dtype, device = model.model.diffusion_model, model.model.get_dtype_inference(), model.load_device
    words = -(-given["tokens"] // module.pad_tokens_multiple) * module.pad_tokens_multiple
    rows, columns = (side // module.patch_size for side in given["shape"][-2:])
    table = forward.rotation_table(module, words, rows, columns, device)
    joint = module.joints[tuple(given["members"])]
    share = joint.ranks.share(1, words, len(table) - words)
    total = 0.0
    for blocks, exchanged, angles in zip(
        (module.layers, module.noise_refiner), (share.joint, share.refining), share.angles(table, words), strict=True
    ):
        once = _exchanged(blocks[0].attention, exchanged, angles, dtype)
        seconds = measured.replay_seconds(once, joint.least) if device.type == "cuda" else _seconds(once)
        total += len(blocks) * seconds
    return total


def _exchanged(attention, exchanged: Exchange, angles: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """One layer's: what is sent where it attends, and comes back."""
    shape = 1, len(angles), 3, attention.n_local_heads, attention.head_dim
    qkv = torch.randn(shape, device=angles.device, dtype=dtype)
    gains = attention.q_norm.weight, attention.k_norm.weight
    return lambda: exchanged.attention(lambda parts: qkv[:, :, parts], gains, angles, forward.QK_EPS, lambda q, k, v: q)


def _seconds(once: Callable[[], object]) -> float:
    once()
    began = time.perf_counter()
    for _ in range(CALLS):
        once()
    return (time.perf_counter() - began) / CALLS


OPERATIONS = {"exchange": exchange}
