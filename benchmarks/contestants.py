"""Who takes part in the server benchmark, and the prompt each is given, in the API's format."""

import dataclasses
import itertools
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Graph = dict[str, dict[str, Any]]

SHIPPED = Path(__file__).resolve().parent.parent / "workflows" / "api" / "Z-Image-Turbo_SingleCard.json"
STEPS = 8
FILES = ("diffusion_models", "text_encoders", "vae")
STOCK, MIXED, OURS = "stock nodes", "stock nodes behind our loader", "our nodes"

_SIZES = ("large", "small", "tiny", "medium")
_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black", "brown", "pink")
_SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "hexagon", "crescent")
_PLACES = ("at the top left", "at the top right", "in the centre", "at the bottom left", "at the bottom right")
_SIGNS = ("OPEN", "你好", "TAXI", "茶", "SALE", "北京", "EXIT", "书店")


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt: the words, the seed, the side of its square pictures in pixels and how many are drawn at once."""

    text: str
    seed: int
    size: int
    batch: int

    @classmethod
    def numbered(cls, number: int, size: int, batch: int) -> "Request":
        """The same number is the same prompt and seed for every contestant; another number shares neither."""
        return cls(prompt_text(number), number, size, batch)


def prompt_text(number: int) -> str:
    """Some 40 words that differ from number to number: five things, each with its place, on a background."""
    draw = random.Random(number)
    things = [
        f"a {draw.choice(_SIZES)} {draw.choice(_COLOURS)} {draw.choice(_SHAPES)} {place}" for place in _PLACES[:4]
    ]
    sign = f'a {draw.choice(_COLOURS)} sign {_PLACES[4]} that says "{draw.choice(_SIGNS)}" in {draw.choice(_COLOURS)}'
    return ", ".join([*things, sign, f"{draw.choice(_COLOURS)} background, drawing {number}"])


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A ComfyUI server with options of its own and the nodes that it is asked to run.

    nodes: STOCK, MIXED or OURS. precision: our loader's input; for STOCK "", or the host's format that the file has.
    model: a file in diffusion_models, where it is not the official one. split: how our loader's multi-gpu shares
    pictures out, on all GPUs; "" for one GPU.
    yardstick: its distance from the fp32 picture is what 16 bits cost, and the measure for others.
    """

    name: str
    nodes: str
    precision: str = ""
    options: tuple[str, ...] = ()
    needs_gpu: bool = False
    yardstick: bool = False
    model: str = ""
    split: str = ""

    def graph(self, request: Request, files: Mapping[str, str]) -> Graph:
        """files: the name of the weight file in each folder of FILES; empty for the built-in demo (not STOCK)."""
        if self.nodes == OURS:
            return _ours(request, files, self.precision, self.split)
        return _stock(request, files, self.precision if self.nodes == MIXED else None)


def reference(demo: bool) -> Contestant:
    """Draws the pictures that all others are held against: the host's nodes in fp32."""
    if demo:  # the host's loaders know only the official sizes
        return Contestant(f"{MIXED}, fp32", MIXED, "fp32")
    return Contestant(f"{STOCK}, fp32", STOCK, options=("--fp32-unet", "--fp32-text-enc", "--fp32-vae"))


def contestants(
    demo: bool, precisions: list[str], formats: Mapping[str, str], splits: Iterable[str] = ()
) -> list[Contestant]:
    """In the order of the run: the yardstick stands before those that it measures.

    formats: the host's own low-bit formats that take part, each with its file in diffusion_models. splits: of ours on
    all GPUs, beside those on one.
    """
    return [
        Contestant(STOCK, STOCK, yardstick=not demo),
        Contestant(f"{STOCK}, --gpu-only", STOCK, options=("--gpu-only",), needs_gpu=True),
        *([Contestant(MIXED, MIXED, "auto", yardstick=True)] if demo else []),
        *(Contestant(f"{STOCK}, {form}", STOCK, form, ("--gpu-only",), True, model=formats[form]) for form in formats),
        *(Contestant(f"{OURS}, {precision}", OURS, precision) for precision in precisions),
        *(
            Contestant(f"{OURS}, {precision}, multi-gpu {split}", OURS, precision, split=split)
            for precision, split in itertools.product(precisions, splits)
        ),
    ]


def _ours(request: Request, files: Mapping[str, str], precision: str, split: str) -> Graph:
    """The shipped workflow with other values in its fields."""
    graph = json.loads(SHIPPED.read_text(encoding="utf-8"))
    by_class = {node["class_type"]: node["inputs"] for node in graph.values()}
    kept = bool(files)  # so that a second start has something to read; the demo is quantised in no time
    by_class["ZImageTurboLoader"].update(choice(files), precision=precision, cache_quantised=kept)
    if split:
        by_class["ZImageTurboLoader"].update(device="multi-gpu", split=split)
    by_class["ZImageTurboTextEncode"]["text"] = request.text
    by_class["ZImageTurboSampler"].update(
        seed=request.seed, steps=STEPS, width=request.size, height=request.size, batch_size=request.batch
    )
    return graph


def choice(files: Mapping[str, str]) -> dict[str, str]:
    """Our loader's inputs for the files, or for the demo."""
    if not files:
        return {"diffusion_model": "demo", "text_encoder": "auto", "vae": "auto"}
    return dict(zip(("diffusion_model", "text_encoder", "vae"), (files[folder] for folder in FILES), strict=True))


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _stock(request: Request, files: Mapping[str, str], loader_precision: str | None) -> Graph:
    """The stock workflow for Z-Image-Turbo; loaded by our loader if its precision is given."""
    if loader_precision is None:
        loaders = {
            "1": _node("UNETLoader", unet_name=files["diffusion_models"], weight_dtype="default"),
            "2": _node("CLIPLoader", clip_name=files["text_encoders"], type="lumina2", device="default"),
            "3": _node("VAELoader", vae_name=files["vae"]),
        }
        model, clip, vae = ["1", 0], ["2", 0], ["3", 0]
    else:
        loaders = {"1": _node("ZImageTurboLoader", **choice(files), precision=loader_precision, device="auto")}
        model, clip, vae = ["1", 0], ["1", 1], ["1", 2]
    size = {"width": request.size, "height": request.size, "batch_size": request.batch}
    sampling = {"steps": STEPS, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return loaders | {
        "4": _node("ModelSamplingAuraFlow", model=model, shift=3.0),
        "5": _node("CLIPTextEncode", clip=clip, text=request.text),
        "6": _node("ConditioningZeroOut", conditioning=["5", 0]),
        "7": _node("EmptySD3LatentImage", **size),
        "8": _node(
            "KSampler",
            model=["4", 0],
            positive=["5", 0],
            negative=["6", 0],
            latent_image=["7", 0],
            seed=request.seed,
            **sampling,
        ),
        "9": _node("VAEDecode", samples=["8", 0], vae=vae),
        "10": _node("SaveImage", images=["9", 0], filename_prefix="benchmark"),
    }
