"""--hosts, --address and join: what is wrong is said before anything starts; what is right reaches multi-gpu."""

import pytest

from zimage_turbo.engine.group.hosts import Hosts
from zimage_turbo.launcher import hosts
from zimage_turbo.launcher.python_probe import Device
from zimage_turbo.launcher.report import LauncherError

from .test_machine import facts

TOKEN = {"ZIMAGE_GROUP_TOKEN": "known to all machines"}
ELSEWHERE = "192.0.2.1"  # of a network that is for examples only


def test_without_the_options_it_is_this_machine_alone():
    assert hosts.told(None, None, {}) == {}
    assert Hosts.of({}) is None and Hosts.of({"ZIMAGE_GROUP_HOSTS": "1"}) is None


def test_the_options_reach_multi_gpu():
    assert Hosts.of(TOKEN | hosts.told(3, "127.0.0.1", TOKEN)) == Hosts(3, "127.0.0.1")


@pytest.mark.parametrize(
    ("count", "address", "environ", "said"),
    [
        (2, None, TOKEN, "--hosts is 2, --address missing: they belong together"),
        (None, "127.0.0.1", TOKEN, "--hosts is missing"),
        (1, "127.0.0.1", TOKEN, "--hosts 1: it is how many machines"),
        (2, ELSEWHERE, TOKEN, f"--address {ELSEWHERE} is no IPv4 address of this machine"),
        (2, "0.0.0.0", TOKEN, "it names no machine"),
        (2, "127.0.0.1", {}, "ZIMAGE_GROUP_TOKEN is not set"),
    ],
)
def test_options_that_cannot_be(count, address, environ, said):
    with pytest.raises(LauncherError, match=said):
        hosts.told(count, address, environ)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"ZIMAGE_GROUP_HOSTS": "two"}, "ZIMAGE_GROUP_HOSTS is 'two'"),
        ({"ZIMAGE_GROUP_HOSTS": "0"}, "ZIMAGE_GROUP_HOSTS is '0'"),
        ({"ZIMAGE_GROUP_HOSTS": "2"} | TOKEN, "ZIMAGE_GROUP_ADDRESS is ''"),
        ({"ZIMAGE_GROUP_HOSTS": "2", "ZIMAGE_GROUP_ADDRESS": "0.0.0.0"} | TOKEN, "by which the other machines reach"),
        ({"ZIMAGE_GROUP_HOSTS": "2", "ZIMAGE_GROUP_ADDRESS": "10.0.0.1"}, "ZIMAGE_GROUP_TOKEN is not set"),
    ],
)
def test_an_environment_that_cannot_be(environ, said):
    with pytest.raises(ValueError, match=said):
        Hosts.of(environ)


def test_what_a_machine_lends():
    three = facts(devices=(Device("a GPU", 1, 1),) * 3)
    assert hosts.lent(three, None, {}) == ["cuda:0", "cuda:1", "cuda:2"]
    assert hosts.lent(three, 2, {}) == ["cuda:0", "cuda:1"]
    assert hosts.lent(facts(), None, {}) == ["cpu", "cpu"]
    with pytest.raises(LauncherError, match=r"--num_gpus 4: 3 GPU\(s\) are visible"):
        hosts.lent(three, 4, {})


def test_a_url_that_is_none():
    with pytest.raises(LauncherError, match=r"'10\.0\.0\.1' is no URL of a group"):
        hosts.join(None, "10.0.0.1", "127.0.0.1", None, None)
