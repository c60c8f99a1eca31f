"""Training scenes with their captions as arrays, made by all processor cores."""

import multiprocessing
import os
import random
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from .captions import caption
from .defaults import settle
from .picture import FIELDS, scene_arrays
from .tokenization import encode
from .world import held_out, sample_scene

LONGEST_PROMPT = 64
SIDES = tuple(range(192, 385, 16))
SQUARE = (256, 256)
# Every side comes twice as a width and twice as a height; the sizes between them are learned by analogy.
OTHER_SIZES = tuple((width, SIDES[(5 * i + shift) % len(SIDES)]) for shift in (0, 7) for i, width in enumerate(SIDES))
CHUNK = 1000

Arrays = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Job:
    size: tuple[int, int]
    count: int
    seed: int


def make_rows(tokenizer: Tokenizer, job: Job) -> dict[str, np.ndarray]:
    """Scenes of one size. `tokens` [count, 64] holds the prompt, zero after `length`; held-out captions never occur."""
    rng = random.Random(job.seed)
    rows = []
    while len(rows) < job.count:
        scene = sample_scene(rng, *job.size)
        text, said = caption(rng, scene)
        ids, drawn = encode(tokenizer, text), settle(scene, said)
        if drawn is None or held_out(text) or len(ids) > LONGEST_PROMPT:
            continue
        tokens = np.zeros(LONGEST_PROMPT, np.int64)
        tokens[: len(ids)] = ids
        rows.append({**scene_arrays(drawn), "tokens": tokens, "length": np.array(len(ids))})
    return {name: np.stack([row[name] for row in rows]) for name in (*FIELDS, "tokens", "length")}


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer_json: str) -> None:
    global _worker_tokenizer
    _worker_tokenizer = Tokenizer.from_str(tokenizer_json)


def _run_job(job: Job) -> tuple[tuple[int, int], dict[str, np.ndarray]]:
    return job.size, make_rows(_worker_tokenizer, job)


def make_dataset(counts: dict[tuple[int, int], int], tokenizer: Tokenizer, seed: int) -> dict[tuple[int, int], Arrays]:
    """`counts` scenes of each size. Must run before CUDA is first used, because the workers are forked."""
    jobs = [
        Job(size, min(CHUNK, count - done), seed * 1_000_003 + 7919 * index + done)
        for index, (size, count) in enumerate(counts.items())
        for done in range(0, count, CHUNK)
    ]
    parts: dict[tuple[int, int], list] = {size: [] for size in counts}
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), _start_worker, (tokenizer.to_str(),)) as pool:
        for size, rows in pool.imap(_run_job, jobs, chunksize=4):
            parts[size].append(rows)
    return {
        size: {name: torch.from_numpy(np.concatenate([rows[name] for rows in chunks])) for name in chunks[0]}
        for size, chunks in parts.items()
    }


def take(data: Arrays, rows: torch.Tensor, device: torch.device) -> Arrays:
    return {name: values[rows].to(device, non_blocking=True) for name, values in data.items()}
