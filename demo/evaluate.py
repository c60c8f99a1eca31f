"""How well a checkpoint draws: `python -m demo.evaluate --checkpoint demo --out demo/evaluation.json`.

`score` works with any function that draws, so the same prompts can be put to the training modules and to a host.
"""

import argparse
import json
import math
import pathlib
import random
from collections.abc import Callable
from multiprocessing import get_context

import numpy as np
import torch
from PIL import Image

from .checkpoint import load_part, load_tokenizer
from .judge import Verdict, judge
from .model import Model, draw
from .picture import load_atlas, render, stack_scenes
from .prompts import SETS, SHOWN, Prompt
from .world import sample_scene

ITEMS = ("ground", "shapes", "characters", "sign_colours")
Draw = Callable[[list[str], list[int], list[tuple[int, int]]], list[torch.Tensor]]


def lower_bound(right: int, total: int, z: float = 1.645) -> float:
    """The rate that is exceeded with 95 % confidence (Wilson's one-sided bound)."""
    if total == 0:
        return 0.0
    rate, extra = right / total, z * z / total
    spread = z * math.sqrt(rate * (1 - rate) / total + extra / (4 * total))
    return (rate + extra / 2 - spread) / (1 + extra)


def verdict_list(verdict: Verdict, name: str) -> list[bool]:
    value = getattr(verdict, name)
    return [] if value is None else [value] if name == "ground" else value


def summarise(verdicts: list[Verdict]) -> dict:
    """Counts and rates of every kind of item, and of pictures in which all that was said is right."""
    lists = {name: [] for name in (*ITEMS, "pictures")}
    for verdict in verdicts:
        lists["pictures"].append(verdict.all_right)
        for name in ITEMS:
            lists[name] += verdict_list(verdict, name)
    lists["items"] = [value for name in ITEMS for value in lists[name]]
    return {
        name: {
            "right": sum(values),
            "total": len(values),
            "rate": round(sum(values) / len(values), 4),
            "at_least": round(lower_bound(sum(values), len(values)), 4),
        }
        for name, values in lists.items()
        if values
    }


def judge_one(picture: np.ndarray, prompt: Prompt) -> Verdict:
    """picture: as `to_bytes` makes it. For a process of its own: from then on it has one thread."""
    torch.set_num_threads(1)
    return judge(torch.from_numpy(picture).float() / 255, prompt.said)


def score(draw_pictures: Draw, prompts: list[Prompt], processes: int = 1) -> tuple[dict, list[Verdict]]:
    """Draw the prompts and judge what came out, rounded to 8 bits as in a saved file."""
    sizes = [(prompt.said.width, prompt.said.height) for prompt in prompts]
    pictures = draw_pictures([prompt.text for prompt in prompts], [prompt.seed for prompt in prompts], sizes)
    jobs = [(to_bytes(picture), prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    if processes == 1:
        verdicts = [judge_one(*job) for job in jobs]
    else:
        with get_context("spawn").Pool(processes) as pool:
            verdicts = pool.starmap(judge_one, jobs, chunksize=8)
    return summarise(verdicts), verdicts


def to_bytes(picture: torch.Tensor) -> np.ndarray:
    return (picture.clamp(0, 1) * 255).round().byte().numpy()


def failures(prompts: list[Prompt], verdicts: list[Verdict]) -> list[dict]:
    """The prompts that did not come out right, and the kinds of item that were wrong."""
    return [
        {
            "prompt": p.text,
            "size": [p.said.width, p.said.height],
            "seed": p.seed,
            "wrong": [name for name in ITEMS if not all(verdict_list(v, name))],
        }
        for p, v in zip(prompts, verdicts, strict=True)
        if not v.all_right
    ]


def reconstruction(vae, count: int = 100) -> float:
    """Mean PSNR in dB of rendered 256x256 scenes that the autoencoder encodes and decodes."""
    rng, atlas, values = random.Random(99), load_atlas(), []
    device = next(vae.parameters()).device
    for _ in range(count // 10):
        x = render(stack_scenes([sample_scene(rng, test=True) for _ in range(10)]), 256, 256, atlas).to(device)
        with torch.no_grad():
            y = vae.pictures(vae.latents(x))
        values += (-10 * ((x - y).square().mean((1, 2, 3)) / 4).log10()).tolist()
    return round(float(np.mean(values)), 2)


def contact_sheet(pictures: list[torch.Tensor], columns: int = 6, gap: int = 4) -> Image.Image:
    """Pictures of one size, left to right and top to bottom."""
    tiles = [to_bytes(picture) for picture in pictures]
    height, width, _ = tiles[0].shape
    rows = math.ceil(len(tiles) / columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 90, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return Image.fromarray(sheet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--grid", type=pathlib.Path, help="PNG file to write the prompts of prompts.SHOWN to")
    parser.add_argument("--count", type=int, default=500, help="prompts of each set")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--processes", type=int, default=1, help="processes that judge")
    args = parser.parse_args()
    model = Model(load_part(args.checkpoint, "text_encoder"), load_part(args.checkpoint, "transformer")).to(args.device)
    vae = load_part(args.checkpoint, "vae").to(args.device)
    tokenizer = load_tokenizer(args.checkpoint)

    def draw_pictures(prompts: list[str], seeds: list[int], sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
        return draw(model, vae, tokenizer, prompts, seeds, sizes, args.batch)

    report = {"autoencoder_psnr_db": reconstruction(vae), "sets": {}, "failures": {}}
    if args.grid:
        shown = draw_pictures(list(SHOWN), list(range(len(SHOWN))), [(256, 256)] * len(SHOWN))
        contact_sheet(shown).save(args.grid, optimize=True)
    for name in args.sets:
        prompts = SETS[name](args.count)
        report["sets"][name], verdicts = score(draw_pictures, prompts, args.processes)
        report["failures"][name] = failures(prompts, verdicts)
        print(name, json.dumps(report["sets"][name]), flush=True)
    args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
