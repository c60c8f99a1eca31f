"""Prompts in the API's format, made from the saved workflow."""

import copy
import json
from pathlib import Path
from typing import Any

Graph = dict[str, dict[str, Any]]

PACK = Path(__file__).resolve().parent.parent.parent
SAVED = PACK / "workflows" / "api" / "Z-Image-Turbo_SingleCard.json"
LOADER, PROMPT, SAMPLER, DECODE, SAVE = "12345"
CANCELLED_STEPS = 100  # the most that the sampler takes: long enough to be caught in the middle


def saved() -> Graph:
    return json.loads(SAVED.read_text(encoding="utf-8"))


def turbo(**inputs: Any) -> Graph:
    """The saved workflow with fields changed by name."""
    return changed(saved(), **inputs)


def changed(graph: Graph, **inputs: Any) -> Graph:
    """A copy with other values in its fields (inputs that are no links); every name belongs to one node."""
    graph = copy.deepcopy(graph)
    for name, value in inputs.items():
        owners = [node for node in graph.values() if not isinstance(node["inputs"].get(name, []), list)]
        assert len(owners) == 1, f"{name} belongs to {len(owners)} nodes"
        owners[0]["inputs"][name] = value
    return graph


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def image_to_image(file: str, seed: int, denoise: float, text: str) -> Graph:
    """The saved workflow, started from a picture in the input folder."""
    graph = turbo(seed=seed, denoise=denoise, text=text)
    graph["6"] = node("LoadImage", image=file)
    graph["7"] = node("VAEEncode", pixels=["6", 0], vae=[LOADER, 2])
    graph[SAMPLER]["inputs"]["latent_image"] = ["7", 0]
    return graph


def from_latent(file: str) -> Graph:
    """The saved workflow, started from a .latent file in the input folder."""
    graph = turbo(denoise=0.5)
    graph["6"] = node("LoadLatent", latent=file)
    graph[SAMPLER]["inputs"]["latent_image"] = ["6", 0]
    return graph


def custom_sampler(seed: int, solver: str) -> Graph:
    """Our schedule and solver in the stock SamplerCustomAdvanced."""
    graph = turbo()
    graph["6"] = node("ZImageTurboSigmas", steps=8, denoise=1.0, solver=solver)
    graph["7"] = node("RandomNoise", noise_seed=seed)
    graph["8"] = node("BasicGuider", model=[LOADER, 0], conditioning=[PROMPT, 0])
    graph["9"] = node("EmptySD3LatentImage", width=256, height=256, batch_size=1)
    graph[SAMPLER] = node(
        "SamplerCustomAdvanced",
        noise=["7", 0],
        guider=["8", 0],
        sampler=["6", 1],
        sigmas=["6", 0],
        latent_image=["9", 0],
    )
    del graph[SAVE]["inputs"]["report"]
    return graph


def stock(seed: int) -> Graph:
    """Only the loader is ours: the stock workflow for Z-Image-Turbo with the official settings."""
    graph = turbo()
    graph[PROMPT]["class_type"] = "CLIPTextEncode"
    graph["6"] = node("ModelSamplingAuraFlow", model=[LOADER, 0], shift=3.0)
    graph["7"] = node("ConditioningZeroOut", conditioning=[PROMPT, 0])
    graph["8"] = node("EmptySD3LatentImage", width=256, height=256, batch_size=1)
    graph[SAMPLER] = node(
        "KSampler",
        model=["6", 0],
        positive=[PROMPT, 0],
        negative=["7", 0],
        latent_image=["8", 0],
        seed=seed,
        steps=8,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    del graph[SAVE]["inputs"]["report"]
    return graph
