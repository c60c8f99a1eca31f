"""The parts of benchmarks/multi_gpu.py that need no ranks: order of rows, time, efficiency, table, load of GPUs."""

from types import SimpleNamespace

import pynvml
import pytest
import torch

from zimage_turbo.benchmarks import group_rows, multi_gpu
from zimage_turbo.benchmarks.card_log import MIB, CardLog
from zimage_turbo.benchmarks.group_rows import GroupRows


@pytest.fixture
def rows():
    made = GroupRows(None, ("cpu", "cpu"), [1, 2], [].append)
    made.kept, made.exact = [], torch.ones(1)
    made.keep = made.kept.append
    return made


def test_what_weighs_most_comes_first(rows):
    names = [name for name, _ in rows.steps(["int4-fp8", "bf16"], [1024, 512])]
    assert names[:2] == ["start", "parity, int4-fp8"] and len(set(names)) == len(names)
    order = ["4 pictures a card on 2, int4-fp8", "latency of 1024 on 2, int4-fp8", "recovery", "second start"]
    order += ["latency of 512 on 2, int4-fp8", "2 pictures a card on 2, int4-fp8", "latency of 512 on 2, bf16"]
    assert [name for name in names if name in order] == order


def test_wrong_pictures_are_not_timed(rows):
    rows.wrong.add("int4-fp8")
    names = [name for name, _ in rows.steps(["int4-fp8", "bf16"], [1024])]
    assert [name for name in names if "int4-fp8" in name] == ["parity, int4-fp8"]
    assert "latency of 1024 on 2, bf16" in names


def test_what_there_is_no_time_for_is_named(rows):
    begun = []
    assert rows.run([("a", lambda: begun.append("a"))], 60.0) == [] and begun == ["a"]
    assert rows.run([("a", lambda: begun.append("a")), ("b", begun.clear)], -1.0) == ["a", "b"] and begun == ["a"]


def test_efficiency_is_the_rate_against_that_of_one(rows, monkeypatch):
    seconds = iter([[2.0, 2.0, 2.0], [2.5, 2.5, 2.5]])
    monkeypatch.setattr(group_rows, "times", lambda draw: next(seconds))
    rows.cards = SimpleNamespace(key="fp8", pictures=lambda *_: None, memory=lambda: [100, 200])
    rows.prompts = [None] * 8
    for gpus in (1, 2):
        rows.images("fp8", gpus, 4, 64)
    one, two = rows.kept
    assert one["images_per_s"] == 2.0 and "efficiency" not in one and one["ranks_mib"] == [100]
    assert two["images_per_s"] == 3.2 and two["efficiency"] == 0.8 and two["all_p50_s"] == 2.5


def test_every_row_has_a_line():
    of = {"precision": "fp8", "gpus": 2, "size": 512}
    report = {"ranks": ["cuda:0"] * 2, "device": "a GPU", "topology": "2 GPUs: 0 1 by NVLink", "left_out": ["recovery"]}
    report["rows"] = [
        of | {"what": "start", "seconds": 12.0, "said": "10.0 s to ready"},
        of | {"what": "parity", "gate": False, "said": "3 of 4 pictures are those of one GPU"},
        of | {"what": "images", "a_card": 4, "images_per_s": 4.0, "efficiency": 0.985, "busy_percent": [99, 98],
              "memory_mib": [9000, 8000]},
        of | {"what": "latency", "denoise_p50_s": 0.25, "picture_p50_s": 0.28, "speed_up": 1.75},
        of | {"what": "exchange", "alone_s": 0.04, "together_s": 0.025, "beyond_ideal_s": 0.005, "exchange_s": 0.004},
    ]  # fmt: skip
    _, *lines, left_out = multi_gpu.table(report)
    words = "12.0 s", "WRONG", "98.5 % of linear", "1.75 times", "5.00 beyond"
    assert all(word in line for line, word in zip(lines, words, strict=True)) and left_out.endswith("recovery")


def test_load_of_gpus(monkeypatch):
    busy = {"a": iter([100, 50]), "b": iter([0, 0])}
    nvml = {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=next(busy[gpu])),
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used={"a": 700, "b": 5}[gpu] * MIB),
    }  # fmt: skip
    for name, function in nvml.items():
        monkeypatch.setattr(pynvml, name, function)
    monkeypatch.setattr(CardLog, "interval", 3600)
    with CardLog(["a", "b"]) as log:
        log.sample(), log.sample()
    assert log.summary() == {"busy_percent": [75, 0], "memory_mib": [700, 5]}
    with CardLog([]) as log:
        log.sample()
    assert log.summary() == {}
