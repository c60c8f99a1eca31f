"""The parts of benchmarks/memory.py, endurance.py, group_endurance.py and plots.py that need no GPU."""

import json

import pytest
import torch

from zimage_turbo.benchmarks import plots
from zimage_turbo.benchmarks.allocator_log import AllocatorLog
from zimage_turbo.benchmarks.pipeline import held

MIB = 2**20
CONDITIONS = {"date": "2026-01-01", "device": "a GPU", "driver": "1", "torch": "2", "triton": "3", "comfyui": "0.30.0"}
SERVER = {
    "hardware": "a GPU", "date": "2026-01-01", "versions": {"torch": "2"}, "weights": "demo",
    "contestants": [
        {
            "name": "ours", "gpu_memory_by": "process", "memory": [[0.0, 10, 20], [1.0, 11, 30]],
            "rows": [
                {"size": 512, "batch": batch, "p20_s": 0.9, "p50_s": 1.0, "p80_s": 1.1} for batch in (1, 2)
            ],
        }
    ],
}  # fmt: skip
DENOISE = CONDITIONS | {
    "rows": [{"what": "ours", "size": 512, "batch": batch, "denoise_ms": 9.0 * batch} for batch in (1, 2, 4)]
}
ENDURANCE = CONDITIONS | {
    "precision": "int4",
    "pictures": [{"number": number, "allocated_mib": 100.0, "reserved_mib": 200.0} for number in (1, 2)],
}
GROUP = CONDITIONS | {
    "requests": [
        {"images": number, "coordinator": {"kept_mib": 500}, "ranks": [{"kept_mib": 600, "allocated_mib": 100}] * 2}
        for number in (3, 5)
    ],
}
MEMORY = CONDITIONS | {
    "cap_gib": 8.0,
    "runs": [
        {
            "precision": "int4",
            "series": [[0.0, 1, 2], [1.0, 3, 4]],
            "phases": [{"phase": "load", "begin_s": 0.0}, {"phase": "encode 1", "begin_s": 0.5}],
        }
    ],
}

MULTI_GPU = CONDITIONS | {
    "ranks": ["cuda:0", "cuda:1"],
    "rows": [
        {"what": "images", "precision": "fp8", "gpus": gpus, "a_card": 4, "images_per_s": 2.0 * gpus} for gpus in (1, 2)
    ]
    + [
        {"what": "latency", "precision": "fp8", "gpus": gpus, "size": size, "denoise_p50_s": size / gpus}
        for gpus, size in ((1, 1024), (2, 1024), (2, 512))
    ],
}


def test_samples_that_repeat_both_neighbours_are_left_out():
    log = AllocatorLog()
    log.samples = [(second / 100, held * MIB, 9 * MIB) for second, held in enumerate([5, 5, 5, 5, 7, 7, 5])]
    assert log.series() == [(0.0, 5, 9), (0.03, 5, 9), (0.04, 7, 9), (0.05, 7, 9), (0.06, 5, 9)]


def test_weights_are_counted_where_they_lie():
    class Patcher:
        model = torch.nn.Linear(8, 4)

    assert held(Patcher) == (0, 4 * (8 * 4 + 4))


@pytest.mark.parametrize(
    "report, expected",
    [
        (SERVER, {"latency", "batch", "memory"}),
        (DENOISE, {"batch"}),
        (ENDURANCE, {"memory"}),
        (GROUP, {"memory"}),
        (MEMORY, {"memory"}),
        (MULTI_GPU, {"rate", "latency"}),
    ],
)
def test_every_kind_of_result_can_be_drawn(report, expected, tmp_path):
    pytest.importorskip("matplotlib")
    plots.write(json.loads(json.dumps(report)), tmp_path / "result.json")
    assert {path.name for path in tmp_path.iterdir()} == {f"result_{kind}.png" for kind in expected}
