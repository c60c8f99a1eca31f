"""The parts of benchmarks/server.py that need no server: prompts, gate, quantiles, memory."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pynvml
import pytest

from zimage_turbo.benchmarks import contestants
from zimage_turbo.benchmarks.contestants import MIXED, OURS, STOCK, Contestant, Request
from zimage_turbo.benchmarks.gate import Gate, distance
from zimage_turbo.benchmarks.server_memory import MemoryLog
from zimage_turbo.benchmarks.server_run import GATE_PROMPT, OTHER_PROMPT, Plan, prepare
from zimage_turbo.benchmarks.timing import quantiles

FILES = {"diffusion_models": "a.safetensors", "text_encoders": "b.safetensors", "vae": "c.safetensors"}
REQUEST = Request.numbered(7, 512, 4)


def picture(seed: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def gate() -> Gate:
    return Gate({64: picture(0)}, distance(picture(1), picture(0)))


def shifted(levels: int) -> np.ndarray:
    """The exact picture with every value moved by as many grey levels."""
    exact = picture(0).astype(int)
    return np.where(exact < 128, exact + levels, exact - levels).astype(np.uint8)


def test_every_number_is_a_prompt_of_its_own():
    texts = {contestants.prompt_text(number) for number in range(500)}
    assert len(texts) == 500
    assert contestants.prompt_text(3) == contestants.prompt_text(3)


@pytest.mark.parametrize("nodes", [STOCK, MIXED, OURS])
def test_every_link_of_a_graph_leads_somewhere(nodes):
    graph = Contestant("", nodes, "int4").graph(REQUEST, FILES)
    links = [value for node in graph.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert links and all(origin in graph for origin, _ in links)


@pytest.mark.parametrize("nodes", [STOCK, MIXED, OURS])
def test_a_graph_asks_for_what_the_request_says(nodes):
    graph = Contestant("", nodes, "int4").graph(REQUEST, FILES)
    given = {name: value for node in graph.values() for name, value in node["inputs"].items()}
    assert (given["seed"], given["steps"], given["width"], given["height"], given["batch_size"]) == (7, 8, 512, 512, 4)
    assert given["text"] == REQUEST.text
    for folder, file in FILES.items():
        assert [file in node["inputs"].values() for node in graph.values()].count(True) == 1, folder
    assert given.get("precision") == (None if nodes == STOCK else "int4")


@pytest.mark.parametrize(
    ("nodes", "saver"), [(STOCK, "SaveImage"), (MIXED, "SaveImage"), (OURS, "ZImageTurboSaveImage")]
)
def test_everyone_saves_with_a_node_of_its_own(nodes, saver):
    graph = Contestant("", nodes, "int4").graph(REQUEST, FILES)
    assert [node["class_type"] for node in graph.values() if "Save" in node["class_type"]] == [saver]


def test_no_timed_prompt_comes_twice():
    nowhere = Path()
    plan = Plan(nowhere, nowhere, nowhere, nowhere, {}, True, [512, 1024], [1, 2, 8], count=10, queued=12, gpu=False)
    by_row = [plan.numbers(index, batch) for index, (batch, _) in enumerate(plan.rows())]
    assert [len(numbers) for numbers in by_row] == [10, 10, 5, 5, 3, 3]
    numbers = [GATE_PROMPT, OTHER_PROMPT, *(number for row in by_row for number in row)]
    assert len(set(numbers)) == len(numbers)


def test_the_demo_is_chosen_by_name():
    loader = Contestant("", OURS, "auto").graph(REQUEST, {})["1"]["inputs"]
    assert (loader["diffusion_model"], loader["text_encoder"], loader["vae"]) == ("demo", "auto", "auto")


def test_the_yardstick_runs_before_ours():
    for demo in (False, True):
        entries = contestants.contestants(demo, ["bf16", "int4"], {"int8": "stock_int8.safetensors"})
        assert [entry.yardstick for entry in entries].count(True) == 1
        ours = [index for index, entry in enumerate(entries) if entry.nodes == OURS]
        assert next(index for index, entry in enumerate(entries) if entry.yardstick) < min(ours)


def test_ours_on_all_gpus():
    entries = contestants.contestants(False, ["int4-fp8", "fp8"], {}, ["sequence"])
    loaders = [entry.graph(REQUEST, FILES)["1"]["inputs"] for entry in entries if entry.nodes == OURS]
    chosen = [(loader["precision"], loader["device"], loader["split"]) for loader in loaders]
    one, many = ("auto", "auto"), ("multi-gpu", "sequence")
    assert chosen == [("int4-fp8", *one), ("fp8", *one), ("int4-fp8", *many), ("fp8", *many)]


def test_distance():
    exact = picture(0)
    assert distance(exact, exact) == 0
    assert distance(picture(1), exact) == pytest.approx(2**0.5, rel=0.05)
    assert distance(exact, np.full_like(exact, 90)) == float("inf")


def test_sixteen_bits_may_be_twice_as_far_away_as_the_host():
    opened = gate()
    assert opened.judge("", True, shifted(4)).held
    assert opened.judge("bf16", False, shifted(7)).held
    assert not opened.judge("bf16", False, shifted(9)).held


def test_one_grey_level_is_no_error():
    opened = gate()
    opened.judge("", True, picture(0))
    assert opened.judge("bf16", False, shifted(1)).held
    assert not opened.judge("bf16", False, shifted(2)).held


def test_no_times_without_a_yardstick():
    verdict = gate().judge("bf16", False, picture(0))
    assert verdict.bound is None and not verdict.held


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int4", "int4-fp8"])
def test_an_unrelated_picture_is_refused_whatever_the_yardstick_drew(precision):
    opened = gate()
    assert not opened.judge("", True, picture(2)).held
    assert not opened.judge(precision, False, picture(3)).held


def test_a_gate_that_sees_no_difference_between_prompts_stays_shut():
    blind = Gate({64: picture(0)}, unrelated=0.01)
    blind.judge("", True, shifted(1))
    assert not blind.judge("int4", False, shifted(2)).held
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert not Gate({64: grey}, distance(picture(1), grey)).judge("int4", False, grey).held


def test_quantiles_are_interpolated():
    assert quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [2.0, 3.5, 5.0]
    json.dumps(quantiles([0.5]))


def test_what_a_contestant_keeps_beside_the_weights_is_its_own(pack, tmp_path):
    models = tmp_path / "models"
    for kind, name in FILES.items():
        (models / kind).mkdir(parents=True)
        (models / kind / name).write_bytes(b"weights")
    plan = Plan(tmp_path, pack, tmp_path / "work", models, FILES, False, [512], [1], count=1, queued=1, gpu=False)
    bases = [prepare(Contestant(name, nodes), plan) for name, nodes in (("one", OURS), ("two", STOCK))]
    for base, linked in zip(bases, (True, False), strict=True):
        assert (base / "models" / "vae" / FILES["vae"]).read_bytes() == b"weights"
        assert any((base / "custom_nodes").iterdir()) == linked
    (bases[0] / "models" / "vae" / "kept.safetensors").write_bytes(b"")
    assert not (models / "vae" / "kept.safetensors").exists()
    assert not (bases[1] / "models" / "vae" / "kept.safetensors").exists()


@pytest.mark.parametrize("seen, by, expected", [(True, "process", 300), (False, "device", 200)])
def test_gpu_memory_is_the_process_s_own_or_what_the_gpu_holds_beyond_before(monkeypatch, seen, by, expected):
    mib = 1024 * 1024
    used = iter([1000 * mib])  # before; then 1200
    process = SimpleNamespace(pid=os.getpid() if seen else 0, usedGpuMemory=300 * mib)
    nvml = {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: "gpu",
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=next(used, 1200 * mib)),
        "nvmlDeviceGetComputeRunningProcesses": lambda gpu: [process, SimpleNamespace(pid=-1, usedGpuMemory=5 * mib)],
    }  # fmt: skip
    for name, function in nvml.items():
        monkeypatch.setattr(pynvml, name, function)
    with MemoryLog(os.getpid()) as memory:
        while len(memory.samples) < 2:
            time.sleep(0.01)
    assert memory.gpu_by == by
    assert memory.peaks(0.0)["peak_gpu_mib"] == expected
    assert {sample[2] for sample in memory.series()} == {expected}
