"""What the processes of a group are started with."""

import json
import sys
from types import SimpleNamespace

import pytest

from zimage_turbo.engine.group import launch
from zimage_turbo.engine.group.launch import Hosts, Setup

SETUP = Setup(("cuda:0", "cuda:2"))
REPORT_TO = "http://127.0.0.1:17860/report"


@pytest.fixture
def rank(monkeypatch):
    """The module that torchrun runs, which is no part of the package."""
    monkeypatch.syspath_prepend(str(launch.INSIDE))
    for name in ("host", "lifeline", "rank"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import rank

    yield rank
    for name in ("host", "lifeline", "rank"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def exchange(rank, device="cuda:2", devices=SETUP.devices, hosts=None):
    """Of the second rank."""
    setup = launch.told(Setup(devices, hosts=hosts), REPORT_TO, None)
    return rank.exchange(setup, device, 1)


def following(words, option):
    return words[words.index(option) + 1]


def test_one_rank_for_each_device():
    words = launch.command(SETUP)
    assert words[0] == sys.executable and "--standalone" in words
    assert following(words, "--nproc-per-node") == "2" and following(words, "--local-addr") == "127.0.0.1"
    assert following(words, "--max-restarts") == "0", "ranks are started anew together, by the coordinator"


def test_several_machines_meet_at_the_first():
    setup = Setup(("cuda:0",), hosts=Hosts(3, "10.0.0.1", 29500))
    words = launch.command(setup)
    assert "--standalone" not in words
    assert following(words, "--nnodes") == "3" and following(words, "--rdzv-endpoint") == "10.0.0.1:29500"
    assert following(words, "--rdzv-conf") == "is_host=1"
    assert launch.told(setup, REPORT_TO, None)["address"] == "10.0.0.1"


def test_the_token_is_in_the_environment_alone():
    environment = launch.environment(SETUP, "secret", REPORT_TO, None)
    assert environment[launch.TOKEN] == "secret"
    assert not [name for name, value in environment.items() if "secret" in value and name != launch.TOKEN]
    told = json.loads(environment["ZIMAGE_GROUP"])
    assert told["devices"] == ["cuda:0", "cuda:2"] and told["report_to"] == REPORT_TO
    assert told["package"] == "zimage_turbo" and told["operations"] == [launch.DUTIES]


def test_every_start_has_a_token_of_its_own():
    tokens = {launch.new_token(SETUP) for _ in range(3)}
    assert len(tokens) == 3 and min(map(len, tokens)) >= 32


def test_ranks_share_the_cores(monkeypatch):
    monkeypatch.setattr(launch, "_cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert launch.environment(SETUP, "", "", None)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch.environment(SETUP, "", "", None)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("name", "ours"), [("MALLOC_ARENA_MAX", "1"), ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")], ids=["heaps", "oneDNN"]
)
def test_ranks_give_memory_back_unless_the_user_wants_otherwise(monkeypatch, name, ours):
    monkeypatch.delenv(name, raising=False)
    assert launch.environment(SETUP, "", "", None)[name] == ours
    monkeypatch.setenv(name, "7")
    assert launch.environment(SETUP, "", "", None)[name] == "7"


@pytest.mark.parametrize(("value", "kept"), [("backend:cudaMallocAsync", False), ("max_split_size_mb:64", True)])
@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_the_allocator_that_the_host_chose_for_itself_is_not_theirs(rank, monkeypatch, name, value, kept):
    monkeypatch.setenv(name, value)
    rank.take_torchs_allocator()
    assert (name in rank.os.environ) == kept


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_graphs_register_nothing_that_lies_in_pieces(rank, monkeypatch, name):
    assert "NCCL_GRAPH_REGISTER" not in exchange(rank)
    monkeypatch.setenv(name, "expandable_segments:True")
    assert exchange(rank)["NCCL_GRAPH_REGISTER"] == "0"


@pytest.mark.skipif(sys.platform != "linux", reason="the interface has another name")
def test_ranks_of_one_machine_meet_where_nobody_else_can(rank):
    assert exchange(rank) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


@pytest.mark.parametrize(
    ("shown", "device", "chosen"),
    [(None, "cuda:3", "3"), ("2, 5", "cuda:1", "5"), ("GPU-a,GPU-b", "cuda:0", "GPU-a"), ("2,5", "cpu", "")],
)
def test_a_rank_sees_its_own_gpu_alone(rank, monkeypatch, shown, device, chosen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown or "")
    if shown is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    rank.choose(device)
    assert rank.os.environ["CUDA_VISIBLE_DEVICES"] == chosen


def test_ranks_of_several_machines_exchange_over_the_network_of_their_address(rank, monkeypatch):
    networks = {"lo": [SimpleNamespace(address="127.0.0.1")], "eth1": [SimpleNamespace(address="10.0.0.1")]}
    monkeypatch.setattr(rank.psutil, "net_if_addrs", lambda: networks)
    assert exchange(rank, hosts=Hosts(2, "127.0.0.2")) == {}
    known = exchange(rank, hosts=Hosts(2, "10.0.0.1"))
    assert known == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "=eth1"}


def test_ranks_that_share_a_gpu_are_hosts_of_their_own_to_nccl(rank):
    assert exchange(rank, "cuda:0", devices=("cuda:0", "cuda:0"))["NCCL_HOSTID"] == "rank 1"
    assert "NCCL_HOSTID" not in exchange(rank, "cpu", devices=("cpu", "cpu")).keys() | exchange(rank).keys()


def test_a_gpu_that_is_not_shown_is_named(rank, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    with pytest.raises(ValueError, match="there is no cuda:2: CUDA_VISIBLE_DEVICES shows '2,5'"):
        rank.choose("cuda:2")
