"""Islands of GPUs that NVLink joins."""

import itertools
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zimage_turbo.engine import topology
from zimage_turbo.engine.topology import Gpu, Topology


def gpus(count: int) -> tuple[Gpu, ...]:
    return tuple(Gpu(index, f"GPU-{index}", "a GPU", None) for index in range(count))


def linked(count: int, *islands: tuple[int, ...]) -> Topology:
    pairs = [pair for island in islands for pair in itertools.combinations(island, 2)]
    return Topology(gpus(count), frozenset(pairs))


BRIDGED = Topology(
    tuple(Gpu(index, f"GPU-{index}", "a GPU", index // 2) for index in range(4)),
    frozenset({(0, 1), (2, 3)}),
    frozenset({(0, 1), (1, 2), (2, 3)}),
)


def test_a_switch_joins_all():
    assert linked(8, tuple(range(8))).islands() == (tuple(range(8)),)


def test_bridges_join_pairs():
    assert linked(4, (0, 1), (2, 3)).islands() == ((0, 1), (2, 3))


def test_a_ring_is_no_island():
    """Four GPUs of which each is linked to two: those on opposite sides are not."""
    ring = Topology(gpus(4), frozenset({(0, 1), (1, 2), (2, 3), (0, 3)}))
    assert ring.islands() == ((0, 1), (2, 3))


def test_the_largest_island_comes_first():
    assert linked(5, (2, 3, 4)).islands() == ((2, 3, 4), (0,), (1,))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Topology(()), "0 GPUs"),
        (linked(1), "1 GPU"),
        (linked(2), "2 GPUs without NVLink"),
        (Topology(gpus(2), peers=frozenset({(0, 1)})), "2 GPUs without NVLink; peer access by PCIe"),
        (linked(4, (0, 1), (2, 3)), "4 GPUs: 0 1 by NVLink, 2 3 by NVLink"),
        (BRIDGED, "4 GPUs: 0 1 by NVLink, 2 3 by NVLink; peer access by PCIe; memory node 0: 0 1, 1: 2 3"),
    ],
)
def test_description(found, said):
    assert found.described() == said


def test_document():
    assert BRIDGED.as_dict() == {
        "described": BRIDGED.described(),
        "nvlink_islands": [[0, 1], [2, 3]],
        "peer_access": [[0, 1], [1, 2], [2, 3]],
        "memory_nodes": [0, 0, 1, 1],
    }


@given(st.integers(1, 9), st.data())
def test_islands_hold_every_gpu_once_and_only_linked_pairs(count, data):
    pairs = list(itertools.combinations(range(count), 2))
    found = Topology(gpus(count), frozenset(data.draw(st.sets(st.sampled_from(pairs))) if pairs else ()))
    islands = found.islands()
    assert sorted(index for island in islands for index in island) == list(range(count))
    assert all(pair in found.nvlink for island in islands for pair in itertools.combinations(island, 2))


def test_what_the_driver_says():
    """On any machine: the GPUs that CUDA shows, none without a driver."""
    found = topology.read()
    assert [gpu.index for gpu in found.gpus] == list(range(torch.cuda.device_count()))
    assert found.nvlink <= set(itertools.combinations(range(len(found.gpus)), 2))


def test_a_driver_that_says_nothing(monkeypatch, caplog):
    """GPUs are there, and work, without it."""

    def silent(uuids):
        raise topology.pynvml.NVMLError(topology.pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(topology, "described_by_driver", silent)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid=index, name="a GPU")
    )
    found = topology.read()
    assert found.gpus == gpus(2) and found.islands() == ((0,), (1,)) and found.described() == "2 GPUs, links unknown"
    assert "the driver does not say how GPUs are linked" in caplog.text
