"""The class that our loader gives to the host's NextDiT: the fast forward where it knows the request."""

import dataclasses
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence

import comfy.ldm.common_dit
import comfy.model_management as management
import comfy.utils
import torch
from comfy.ldm.lumina.model import NextDiT
from comfy.model_base import BaseModel
from comfy.patcher_extension import WrappersMP

from . import forward, layouts, prompt_batch, rows
from .graphs import Graphs
from .measured import attention_backend, settle_form
from .recent import Recent
from .rehearsal import LENGTHS, rehearse, rehearsed
from .residency import resident_weights
from .sequence import Ranks
from .shortage import by_halves, spares_a_graph, with_room

FAST, REPLAYED = "fast", "fast, CUDA graph"
MAX_GRAPHS, MAX_CAPTIONS = 8, 4
MAX_TABLES = 16  # prompts of up to 512 tokens, as long as the model was trained on, have so many padded lengths
ROWS_WHEN_SHORT = 2048  # of a feed-forward at once: 126 MB in 16 bit
FP8_ERROR = 0.06  # of attention where products round to FP8 as well: each errs by 0.04 to 0.05


class TurboNextDiT(NextDiT):
    """`forwards` counts runs by the path taken: FAST, REPLAYED, or why it was the host's. An evaluation is one run, of
    prompts of several padded lengths one for each.

    `attention` names a backend of `kernels.attention`, `base` refers to the host's model around this module, `joint`
    names the ranks that every request is computed with, of those in `joints`; None: this process computes alone.
    """

    attention: str
    base: Callable[[], BaseModel | None]
    forwards: Counter
    bypassed: list[torch.nn.Module]
    norms: list[torch.nn.Module]
    joint: "Joint | None"
    joints: dict[tuple[int, ...], "Joint"]
    graphs: Graphs
    captions: Recent
    tables: Recent

    def _forward(self, x, timesteps, context, num_tokens, attention_mask=None, transformer_options=None, **arguments):
        options = transformer_options if transformer_options is not None else {}
        reason = forward.refusal(self, context, options, arguments)
        if reason:
            self.forwards[reason] += 1
            given = (x, timesteps, context, num_tokens, attention_mask)
            return prompt_batch.each_length(super()._forward, *given, transformer_options=options, **arguments)
        height, width = x.shape[-2:]
        x = comfy.ldm.common_dit.pad_to_patch_size(x, (self.patch_size, self.patch_size))
        lengths = arguments.get(prompt_batch.LENGTHS)
        groups = self._groups(context, lengths) if lengths else [tuple(range(len(x)))]
        captions = self._captions(context, lengths, groups, options)
        weights = resident_weights([self], x.device)
        if weights is None:
            (self.joint or self).graphs.clear()
        parts = []
        for numbers, caption in zip(groups, captions, strict=True):
            given = rows.take(x, numbers), rows.take(timesteps, numbers), caption
            # More groups than graphs would push each other's graph out at every evaluation.
            parts.append(self._fast(*given, weights, graphed=len(parts) < MAX_GRAPHS))
        return rows.restored(parts, groups)[..., :height, :width]

    def _groups(self, context: torch.Tensor, lengths: tuple[int, ...]) -> list[rows.Numbers]:
        """Rows of one padded length, which run together. Raises ValueError if these are not the lengths of context."""
        prompt_batch.check(lengths, context)
        return rows.alike([-(-length // self.pad_tokens_multiple) for length in lengths])

    def _captions(
        self, context: torch.Tensor, lengths: tuple[int, ...] | None, groups: list[rows.Numbers], options: dict
    ) -> list[torch.Tensor]:
        """The refined captions of each group, computed once a prompt: each run of a sampler gives prompts new uuids.

        Wrappers may change the text from step to step, and LoRA hooks the weights: then they are computed anew.
        """
        refine = functools.partial(self._refined, context, lengths, groups)
        uuids = tuple(options.get("uuids") or ())
        patcher = getattr(self.base(), "current_patcher", None)
        wrappers = options.get("wrappers") or {}
        wrapped = any(each for kind, each in wrappers.items() if kind != WrappersMP.PREPARE_SAMPLING)
        changing = wrapped or getattr(patcher, "current_hooks", None)
        key = (uuids, context.shape, context.dtype, lengths)
        return self.captions.get(key, refine) if uuids and not changing else refine()

    def _refined(
        self, context: torch.Tensor, lengths: tuple[int, ...] | None, groups: list[rows.Numbers]
    ) -> list[torch.Tensor]:
        refine = functools.partial(forward.refine_caption, self)
        compute = self.compute(context, exact=True)
        given = [(context, compute)]
        if lengths is not None:
            own = [[lengths[number] for number in numbers] for numbers in groups]
            given = [
                (rows.take(context, numbers)[:, : max(those)], compute, those)
                for numbers, those in zip(groups, own, strict=True)
            ]
        if self.forwards[FAST]:
            return [refine(*each) for each in given]
        few = layouts.is_int4(self.context_refiner[0].attention.qkv.weight)
        others = [(context.new_zeros(1, length, context.shape[2]), compute) for length in LENGTHS if few]
        first, *later = given
        others = [functools.partial(refine, *each) for each in others + later]
        return [rehearsed(refine, context.device, others)(*first), *(refine(*each) for each in later)]

    def compute(self, x: torch.Tensor, exact: bool = False) -> forward.Compute:
        """How a latent of x's type is computed where x lies, by all ranks.

        exact: how a text is, by each rank for itself, and by attention that does not round to FP8.
        """
        block = self.layers[0].attention
        allowed = FP8_ERROR if layouts.takes_rows(block.qkv.weight) and not exact else 0.0
        backend = attention_backend(self.attention, x.device, x.dtype, block.n_local_heads, block.head_dim, allowed)
        return forward.Compute(x.dtype, backend, ranks=self.joint.ranks if self.joint and not exact else None)

    def _fast(
        self, x: torch.Tensor, timesteps: torch.Tensor, caption: torch.Tensor, weights: tuple | None, graphed: bool
    ) -> torch.Tensor:
        """weights: where they lie, if a graph may rely on it; graphed: whether this request is to have one."""
        size = (caption.shape[1], x.shape[2] // self.patch_size, x.shape[3] // self.patch_size, x.device)
        table = self.tables.get(size, lambda: forward.rotation_table(self, *size))
        inputs = [x, timesteps, comfy.utils.repeat_to_batch_size(caption, len(x)), table]
        compute = self.compute(x)
        denoise = functools.partial(forward.denoise, self, compute)
        if compute.ranks:
            self.joint.prepare(denoise, inputs)
            settle_form(self, compute, len(x), caption.shape[1], table, self.joint.least)
        elif weights is not None:
            management.throw_exception_if_processing_interrupted()  # a replay asks no layer
        # Where another rank's weights lie, only it knows: ranks that compute together ask each other.
        if graphed and x.is_cuda and (compute.ranks or weights is not None):
            result = (self.joint or self).graphs.run(denoise, inputs, weights and (compute, weights))
            if result is not None:
                self.forwards[REPLAYED] += 1
                return result
        first = not self.forwards[FAST]
        self.forwards[FAST] += 1
        if compute.ranks:  # which would wait for what this one does more than once, or not at all
            return denoise(*inputs)
        run = rehearsed(denoise, x.device) if first else denoise
        return with_room(run, *inputs, frugal=functools.partial(self._frugal, compute))

    def _frugal(self, compute: forward.Compute, *inputs: torch.Tensor) -> torch.Tensor:
        *batches, table = inputs
        frugal = functools.partial(forward.denoise, self, dataclasses.replace(compute, rows=ROWS_WHEN_SHORT))
        return by_halves(lambda *some: frugal(*some, table), *batches)


class Joint:
    """Ranks that compute a module's requests together, all of them the same ones in the same order, with graphs in
    which their exchange is captured. least: as `Graphs` takes it."""

    def __init__(self, ranks: Ranks, least: Callable[[int], int]):
        self.ranks, self.least, self.graphs = ranks, least, Graphs(MAX_GRAPHS, spares_a_graph, least)
        self.prepared = False

    def prepare(self, function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        """Before the first request: compile what function(*inputs) needs, for as many rows as each of the ranks has.
        What they exchange in this rehearsal is garbage, but all do so at once."""
        if not self.prepared:
            rehearse(function, inputs, self.ranks.device)
            self.prepared = True


def free_memory(patcher, unpatch_all: bool) -> None:
    """For the host's ON_DETACH: a model that is unloaded gives back what it keeps between evaluations."""
    if unpatch_all:
        module = patcher.model.diffusion_model
        graphs = (module.graphs, *(joint.graphs for joint in module.joints.values()))
        for kept in (*graphs, module.captions, module.tables):
            kept.clear()


def adopt(module: NextDiT, attention: str = "auto", base: BaseModel | None = None) -> None:
    """Make a module of the host ours; its weights and everything that holds them stay as they are."""
    module.__class__, module.attention = TurboNextDiT, attention
    module.base = weakref.ref(base) if base is not None else lambda: None
    module.bypassed = [part for part in module.modules() if isinstance(part, forward.BYPASSED)]
    module.norms = [layer for layer in module.modules() if isinstance(layer, torch.nn.RMSNorm)]
    module.forwards, module.graphs = Counter(), Graphs(MAX_GRAPHS, spares_a_graph)
    module.joint, module.joints = None, {}
    module.captions, module.tables = Recent(MAX_CAPTIONS), Recent(MAX_TABLES)
