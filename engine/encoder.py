"""The class that our loader gives to the host's text encoder: the fast forward where it knows the request."""

import functools
from collections import Counter

import comfy.model_management as management
import torch
from comfy.text_encoders.z_image import Qwen3_4BModel

from . import qwen
from .graphs import Graphs
from .recent import Recent
from .rehearsal import rehearsed
from .residency import resident_weights
from .shortage import spares_a_graph, with_room
from .turbo import FAST, REPLAYED

BUCKET = 32  # prompts are padded to a multiple of so many tokens: lengths of one bucket share a graph
MAX_GRAPHS = 16  # prompts of up to 512 tokens, as long as the model was trained on


class TurboTextEncoder(Qwen3_4BModel):
    """`forwards` counts evaluations by the path that ran: FAST, REPLAYED, or why it was the host's.

    `compute` is what products are computed in; `weighted` are the parts of the layers that hold weights themselves.
    """

    compute: torch.dtype
    forwards: Counter
    bypassed: list[torch.nn.Module]
    weighted: list[torch.nn.Module]
    graphs: Graphs
    tables: Recent

    def forward(self, tokens):
        """States [B, T, D] fp32, None for pooled ones, and the attention mask [B, T], as the host's gives them."""
        device = self.execution_device or self.transformer.get_input_embeddings().weight.device
        embeds, mask, counts, embeds_info = self.process_tokens(tokens, device)
        reason = qwen.refusal(self, embeds, counts, embeds_info)
        if reason:
            self.forwards[reason] += 1
            return super().forward(tokens)
        states = self._fast(embeds)
        if self.layer == "last":
            states = qwen.last_norm(self.transformer.model, states)
        return states, None, {"attention_mask": mask}

    def _fast(self, embeds: torch.Tensor) -> torch.Tensor:
        """embeds [B, T, D] fp32 through the layers that are wanted.

        Tokens are padded at the end, where no other token attends to them, and cut off again.
        """
        device, count = embeds.device, embeds.shape[1]
        inputs = torch.nn.functional.pad(embeds, (0, 0, 0, -count % BUCKET))
        model, number = self.transformer.model, qwen.layers_wanted(self)
        size = (inputs.shape[1], device)
        table = self.tables.get(size, lambda: qwen.rotation_table(model, *size))
        run = functools.partial(qwen.run_layers, list(model.layers)[:number], self.compute)
        weights = resident_weights(self.weighted, device)
        if weights is None:
            self.graphs.clear()
        else:
            management.throw_exception_if_processing_interrupted()  # a replay asks no layer
            states = self.graphs.run(run, [inputs, table], (number, self.compute, weights))
            if states is not None:
                self.forwards[REPLAYED] += 1
                return states[:, :count]
        run = run if self.forwards[FAST] else rehearsed(run, device)
        self.forwards[FAST] += 1
        return with_room(run, inputs, table)[:, :count]


def free_memory(patcher, unpatch_all: bool) -> None:
    """For the host's ON_DETACH: a text encoder that is unloaded gives back what it keeps between prompts."""
    if unpatch_all:
        module = patcher.model.qwen3_4b
        module.graphs.clear()
        module.tables.clear()


def adopt(module: Qwen3_4BModel, compute: torch.dtype) -> None:
    """Make a module of the host ours; its weights and everything that holds them stay as they are."""
    module.__class__, module.compute = TurboTextEncoder, compute
    module.bypassed = [part for part in module.modules() if isinstance(part, qwen.BYPASSED)]
    parts = module.transformer.model.layers.modules()
    module.weighted = [part for part in parts if any(True for _ in part.parameters(recurse=False))]
    module.forwards, module.graphs, module.tables = Counter(), Graphs(MAX_GRAPHS, spares_a_graph), Recent(MAX_GRAPHS)
