"""The class that our loader gives to the host's text encoder: the fast forward where it knows the request.

On a processor, what a prompt shares with earlier ones comes from pages (see `pool`): its time is that of the tokens
computed. On a GPU it is that of reading the weights: an H100 replays 64 tokens in 5.2 ms and 512 in 8.9 (INT4: 8.0 and
14.0), so that not computing 448 of 512 tokens could save 4 to 6 ms, which hundreds of launches without a graph cost
again. Where weights are copied to the GPU for each prompt, the copies take the time. So no page is kept there.
"""

import functools
from collections import Counter
from collections.abc import Callable, Hashable
from itertools import takewhile

import comfy.model_management as management
import torch
from comfy.text_encoders.z_image import Qwen3_4BModel

from . import layouts, qwen
from .graphs import Graphs
from .pool import Pool, Shape
from .recent import Recent
from .rehearsal import LENGTHS, rehearsed
from .residency import addresses, resident_weights, unchanged_weights
from .shortage import spares_a_graph, with_room
from .turbo import FAST, REPLAYED

BUCKET = 32  # prompts are padded to a multiple of so many tokens: lengths of one bucket share a graph
MAX_GRAPHS = 16  # prompts of up to 512 tokens, as long as the model was trained on
PREFIXED = "fast behind a known prefix"
PAGED = ("cpu",)  # types of devices on which prompts are kept in pages
POOL_BYTES = 2**29  # of pages: of Qwen3-4B 1,800 tokens in fp32, 3,500 in bf16


class TurboTextEncoder(Qwen3_4BModel):
    """`forwards` counts evaluations by the path that ran: FAST, REPLAYED, PREFIXED, or why it was the host's.

    `compute` is what products are computed in; `weighted` are the parts of the layers that hold weights themselves.
    """

    compute: torch.dtype
    forwards: Counter
    bypassed: list[torch.nn.Module]
    weighted: list[torch.nn.Module]
    graphs: Graphs
    tables: Recent
    pool: Pool

    def forward(self, tokens):
        """States [B, T, D] fp32, None for pooled ones, and the attention mask [B, T], as the host's gives them."""
        device = self.execution_device or self.transformer.get_input_embeddings().weight.device
        embeds, mask, counts, embeds_info = self.process_tokens(tokens, device)
        reason = qwen.refusal(self, embeds, counts, embeds_info)
        if reason:
            self.forwards[reason] += 1
            return super().forward(tokens)
        states = self._fast(embeds, list(takewhile(lambda token: isinstance(token, int), tokens[0])))
        if self.layer == "last":
            states = qwen.last_norm(self.transformer.model, states)
        return states, None, {"attention_mask": mask}

    def _fast(self, embeds: torch.Tensor, ids: list[int]) -> torch.Tensor:
        """embeds [B, T, D] fp32 through the layers that are wanted. ids: those that the first text begins with.

        Tokens are padded at the end, where no other token attends to them, and cut off again.
        """
        device, count = embeds.device, embeds.shape[1]
        inputs = torch.nn.functional.pad(embeds, (0, 0, 0, -count % BUCKET))
        model, number = self.transformer.model, qwen.layers_wanted(self)
        size = (inputs.shape[1], device)
        table = self.tables.get(size, lambda: qwen.rotation_table(model, *size))
        run = functools.partial(qwen.run_layers, list(model.layers)[:number], self.compute)
        state = self._pages_depend_on(device) if len(embeds) == 1 else None
        if state is not None:
            return self._behind_known(run, number, inputs, table, ids, state)[:, :count]
        weights = resident_weights(self.weighted, device)
        if weights is None:
            self.graphs.clear()
        else:
            management.throw_exception_if_processing_interrupted()  # a replay asks no layer
            states = self.graphs.run(run, [inputs, table], (number, self.compute, weights))
            if states is not None:
                self.forwards[REPLAYED] += 1
                return states[:, :count]
        if not self.forwards[FAST]:
            # Weights that are not there would be copied for each rehearsal.
            few = weights is not None and layouts.is_int4(model.layers[0].mlp.down_proj.weight)
            run = rehearsed(run, device, [self._call(length, inputs) for length in LENGTHS if few])
        self.forwards[FAST] += 1
        return with_room(run, inputs, table)[:, :count]

    def _call(self, length: int, like: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Two layers of so many tokens, zeros [1, length, D] of the type and device of `like`."""
        model = self.transformer.model
        inputs, table = like.new_zeros(1, length, like.shape[2]), qwen.rotation_table(model, length, like.device)
        return functools.partial(qwen.run_layers, list(model.layers)[:2], self.compute, inputs, table)

    def _pages_depend_on(self, device: torch.device) -> Hashable | None:
        """What keys and values depend on beside tokens and layers; None if pages are not for this device, or if it
        cannot be told which weights are used."""
        if device.type not in PAGED:
            return None
        loaded = (loaded.model for loaded in management.current_loaded_models)
        holders = (patcher for patcher in loaded if patcher is not None)
        patcher = next((each for each in holders if getattr(each.model, "qwen3_4b", None) is self), None)
        if patcher is None or patcher.current_hooks is not None or patcher.is_injected:
            return None
        weights = unchanged_weights([*self.weighted, self.transformer.get_input_embeddings()])
        if weights is None:
            return None
        kinds = tuple((weight.dtype, *addresses(weight)) for weight in weights)
        return patcher.model.current_weight_patches_uuid, self.compute, kinds

    def _behind_known(
        self, run: Callable, number: int, inputs: torch.Tensor, table: torch.Tensor, ids: list[int], state: Hashable
    ) -> torch.Tensor:
        """inputs [1, T, D] through `run`, which runs so many layers, but for what is kept of them under this state."""
        attention = self.transformer.model.layers[0].self_attn
        heads = (attention.num_kv_heads, attention.head_dim)
        shape = Shape(number, *heads, self.compute, inputs.shape[2], inputs.device)
        with self.pool.prompt(ids, shape, state) as prompt:
            self.forwards[PREFIXED if prompt.known else FAST] += 1
            run = functools.partial(run, prompt=prompt)
            return prompt.all_states(with_room(run, inputs[:, prompt.known :], table[prompt.known :]))


def free_memory(patcher, unpatch_all: bool) -> None:
    """For the host's ON_DETACH: a text encoder that is unloaded gives back what it keeps between prompts."""
    if unpatch_all:
        module = patcher.model.qwen3_4b
        module.graphs.clear()
        module.tables.clear()
        module.pool.clear()


def adopt(module: Qwen3_4BModel, compute: torch.dtype) -> None:
    """Make a module of the host ours; its weights and everything that holds them stay as they are."""
    module.__class__, module.compute = TurboTextEncoder, compute
    module.bypassed = [part for part in module.modules() if isinstance(part, qwen.BYPASSED)]
    parts = module.transformer.model.layers.modules()
    module.weighted = [part for part in parts if any(True for _ in part.parameters(recurse=False))]
    module.forwards, module.graphs, module.tables = Counter(), Graphs(MAX_GRAPHS, spares_a_graph), Recent(MAX_GRAPHS)
    module.pool = Pool(POOL_BYTES)
