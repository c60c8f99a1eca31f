"""One rank of a group: a process of ComfyUI's without its server, for `engine.group.worker`. torchrun starts it.

ZIMAGE_GROUP is a JSON object: what `engine.group.launch` writes; ZIMAGE_GROUP_TOKEN is known to this group alone.
"""

import importlib
import json
import os
import socket
import sys
import types
import urllib.request
from pathlib import Path

import host
import lifeline
import psutil

REPORT_SECONDS = 30.0

# A proxy from the environment must not stand between us and the coordinator.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main() -> None:
    lifeline.hold()
    setup, token = json.loads(os.environ.pop("ZIMAGE_GROUP")), os.environ.pop("ZIMAGE_GROUP_TOKEN")
    rank, device = int(os.environ["RANK"]), setup["devices"][int(os.environ["LOCAL_RANK"])]
    if setup["hosts"]:
        os.environ |= exchange_by(setup["address"]) | os.environ
    os.environ |= apart(setup["devices"], int(os.environ["LOCAL_RANK"]), rank) | os.environ

    def report(**facts) -> None:
        """Say facts about this rank to the coordinator. Raises OSError where nobody hears it."""
        about = {"rank": rank, "size": int(os.environ["WORLD_SIZE"]), "pid": os.getpid(), "device": device}
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        body = json.dumps(about | facts).encode()
        _direct.open(urllib.request.Request(setup["report_to"], body, headers), timeout=REPORT_SECONDS).close()

    try:
        choose(device)
        enter(device, setup["options"])
    except Exception as error:
        report(kind="device", fault=f"could not use its device: {error}")
        raise
    package = types.ModuleType(setup["package"])
    package.__path__ = [str(host.PACK)]
    sys.modules[setup["package"]] = package
    importlib.import_module(f"{setup['package']}.engine.group.worker").main(setup, token, rank, report)


def exchange_by(address: str) -> dict[str, str]:
    """Variables to exchange over the network that this machine's address is of: else that is guessed, by the machine's
    name, which may be loopback's, or as the first one that is there."""
    address = socket.gethostbyname(address)
    networks = psutil.net_if_addrs().items()
    name = next((name for name, own in networks if address in (each.address for each in own)), None)
    if name is None:  # as of 127.0.0.2, which no network lists
        return {}
    return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


def apart(devices: list[str], own: int, rank: int) -> dict[str, str]:
    """Variables for a rank that shares its GPU, as tests on a machine with one have it: NCCL refuses two ranks there,
    unless it takes them to be on machines of their own."""
    shared = devices[own] != "cpu" and devices.count(devices[own]) > 1
    return {"NCCL_HOSTID": f"rank {rank}"} if shared else {}


def choose(device: str) -> None:
    """Let this process see its own GPU alone: whatever asks for "the" GPU then has the right one.

    device: 'cpu', or 'cuda:N' as the process that started the group counts. Raises ValueError for one that it lacks.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = device.removeprefix("cuda:")
    if device == "cpu":
        number = ""
    elif seen is not None:
        shown = seen.split(",")
        if int(number) >= len(shown):
            raise ValueError(f"there is no {device}: CUDA_VISIBLE_DEVICES shows {seen!r}")
        number = shown[int(number)].strip()
    os.environ["CUDA_VISIBLE_DEVICES"] = number


def enter(device: str, options: list[str]) -> None:
    """Become one of ComfyUI's processes. Raises RuntimeError where the GPU cannot be used."""
    sys.path.remove(str(Path(__file__).resolve().parent))  # whose modules have common names
    host.enter(host.tree(), [*options, *(["--cpu"] if device == "cpu" and "--cpu" not in options else [])])
    if device != "cpu":
        import torch

        torch.cuda.init()  # where it fails the host would fall back on the processor


if __name__ == "__main__":
    main()
