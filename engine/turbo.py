"""The class that our loader gives to the host's NextDiT: the fast forward where it knows the request."""

import functools
from collections import Counter

import comfy.ldm.common_dit
import comfy.model_management as management
import torch
from comfy.ldm.lumina.model import NextDiT
from comfy.quant_ops import QuantizedTensor

from . import forward
from .graphs import Graphs
from .recent import Recent

FAST, GRAPH = "fast", "fast, CUDA graph"
GRAPHS, CAPTIONS, TABLES = 4, 4, 8  # how many of each are kept


class TurboNextDiT(NextDiT):
    """`forwards` counts evaluations by the path that ran: FAST, GRAPH, or why it was the host's.

    `attention` names a backend of `kernels.attention`.
    """

    attention: str
    forwards: Counter
    graphs: Graphs
    captions: Recent
    tables: Recent

    def _forward(self, x, timesteps, context, num_tokens, attention_mask=None, transformer_options=None, **arguments):
        options = transformer_options if transformer_options is not None else {}
        reason = forward.refusal(context, options, arguments)
        if reason:
            self.forwards[reason] += 1
            return super()._forward(
                x, timesteps, context, num_tokens, attention_mask, transformer_options=options, **arguments
            )
        height, width = x.shape[-2:]
        x = comfy.ldm.common_dit.pad_to_patch_size(x, (self.patch_size, self.patch_size))
        return self._fast(x, timesteps, self._caption(context, options), options)[..., :height, :width]

    def _caption(self, context: torch.Tensor, options: dict) -> torch.Tensor:
        """The refined caption, computed once a prompt: each run of a sampler gives its prompts new uuids."""
        compute = forward.Compute(context.dtype, self.attention)
        refine = functools.partial(forward.refine_caption, self, context, compute)
        uuids = tuple(options.get("uuids") or ())
        return self.captions.get((uuids, context.shape, context.dtype), refine) if uuids else refine()

    def _fast(self, x: torch.Tensor, timesteps: torch.Tensor, caption: torch.Tensor, options: dict) -> torch.Tensor:
        rows, columns, words = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size, caption.shape[1]
        size = (words, rows, columns, x.device)
        table = self.tables.get(size, lambda: forward.rotation_table(self, *size))
        inputs = [x, timesteps, caption.expand(len(x), -1, -1), table]
        denoise = functools.partial(forward.denoise, self, forward.Compute(x.dtype, self.attention))
        if weights := resident_weights(self, x.device):
            management.throw_exception_if_processing_interrupted()  # a replay asks no layer
            result = self.graphs.run(denoise, inputs, (self.attention, weights))
            if result is not None:
                self.forwards[GRAPH] += 1
                return result
        self.forwards[FAST] += 1
        return denoise(*inputs)


def resident_weights(module: torch.nn.Module, device: torch.device) -> tuple[tuple[int, ...], ...] | None:
    """Where every weight lies, if all lie on this GPU and are used as they are; None if a graph cannot hold them."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    if torch.cuda.get_allocator_backend() != "native":  # graphs share a pool, which cudaMallocAsync has none of
        return None
    for layer in module.modules():
        changed = getattr(layer, "weight_function", ()) or getattr(layer, "bias_function", ())
        if changed or hasattr(layer, "_v") or "forward" in vars(layer):  # hooks, dynamic VRAM, bypass LoRA
            return None
    weights = list(module.parameters())
    return tuple(addresses(weight) for weight in weights) if all(w.device == device for w in weights) else None


def addresses(weight: torch.Tensor) -> tuple[int, ...]:
    """Where a weight lies; a quantised one lies in several places."""
    quantised = isinstance(weight, QuantizedTensor)
    parts = weight.layout_cls.get_plain_tensors(weight) if quantised else (weight,)
    return tuple(part.data_ptr() for part in parts)


def free_graphs(patcher, unpatch_all: bool) -> None:
    """For the host's ON_DETACH: a model that is unloaded gives the memory of its graphs back too."""
    if unpatch_all:
        patcher.model.diffusion_model.graphs.clear()


def adopt(module: NextDiT, attention: str = "auto") -> None:
    """Make a module of the host ours; its weights and everything that holds them stay as they are."""
    module.__class__, module.attention = TurboNextDiT, attention
    module.forwards, module.graphs = Counter(), Graphs(GRAPHS)
    module.captions, module.tables = Recent(CAPTIONS), Recent(TABLES)
