"""Warm starts: a trained checkpoint's weights fitted to other widths and another vocabulary."""

import torch
from tokenizers import Tokenizer

State = dict[str, torch.Tensor]
FINE = (
    "encoder.conv_in",
    "encoder.down_blocks.0",
    "encoder.down_blocks.1",
    "decoder.up_blocks.2",
    "decoder.up_blocks.3",
    "decoder.conv_norm_out",
    "decoder.conv_out",
)


def narrow_feed_forward(state: State, hidden: int) -> State:
    """Keep the `hidden` strongest units of every feed-forward. A unit's strength is the product of its three norms."""
    state = dict(state)
    for name in [n.removesuffix("w1.weight") for n in state if n.endswith("feed_forward.w1.weight")]:
        w1, w2, w3 = (state[f"{name}w{i}.weight"] for i in (1, 2, 3))
        kept = (w1.norm(dim=1) * w3.norm(dim=1) * w2.norm(dim=0)).topk(hidden).indices.sort().values
        for i, kept_weight in ((1, w1[kept]), (2, w2[:, kept]), (3, w3[kept])):
            state[f"{name}w{i}.weight"] = kept_weight
    return state


def translate_embeddings(embeddings: torch.Tensor, old: Tokenizer, new: Tokenizer) -> torch.Tensor:
    """[old vocabulary, C] → [new vocabulary, C]: a new token starts as the mean of the old ones that spell it."""
    vocabulary, rows = old.get_vocab(), torch.zeros(new.get_vocab_size(), embeddings.shape[1])
    for token, index in new.get_vocab().items():
        pieces = [vocabulary[token]] if token in vocabulary else [piece.id for piece in old.model.tokenize(token)]
        rows[index] = embeddings[pieces].mean(0)
    return rows


def narrow_autoencoder(teacher: State, student: State) -> State:
    """A narrow autoencoder's start: the wide one's layers at the two finest resolutions, where both are 64 wide.

    The teacher's decoder has a residual block more a level, the first of which narrows, so its later blocks are taken.
    """
    state = dict(student)
    for name in student:
        source = name
        parts = name.split(".")
        if name.startswith(("decoder.up_blocks.2.resnets", "decoder.up_blocks.3.resnets")):
            source = ".".join([*parts[:4], str(int(parts[4]) + 1), *parts[5:]])
        if name.startswith(FINE) and source in teacher and teacher[source].shape == student[name].shape:
            state[name] = teacher[source].clone()
    return state
