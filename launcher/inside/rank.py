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
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # torch's older and newer name of its settings

# A proxy from the environment must not stand between us and the coordinator.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main() -> None:
    lifeline.hold()
    setup, token = json.loads(os.environ.pop("ZIMAGE_GROUP")), os.environ.pop("ZIMAGE_GROUP_TOKEN")
    rank, device = int(os.environ["RANK"]), setup["devices"][int(os.environ["LOCAL_RANK"])]
    take_torchs_allocator()
    os.environ |= exchange(setup, device, rank) | os.environ

    def report(**facts) -> None:
        """Say facts about this rank to the coordinator. Raises OSError where nobody hears it."""
        about = {"rank": rank, "size": int(os.environ["WORLD_SIZE"]), "pid": os.getpid(), "device": device}
        about["address"] = setup["address"]
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


def take_torchs_allocator() -> None:
    """CUDA's own, which the host chooses for itself, has no memory pools that graphs could share."""
    for name in ALLOCATOR:
        settings = os.environ.pop(name, "").split(",")
        if kept := ",".join(each for each in settings if "cudaMallocAsync" not in each):
            os.environ[name] = kept


def exchange(setup: dict, device: str, rank: int) -> dict[str, str]:
    """Variables that say how ranks exchange data, where the user has not."""
    wanted = {}
    if setup["hosts"]:  # left open, it is guessed: by the machine's name, which may be loopback's, or as the first one
        if name := network_of(setup["address"]):
            wanted |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}
    elif sys.platform == "linux":
        # Else they meet at the address that the machine's name stands for, which may be nobody's, or open to others.
        wanted |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo")
    if device != "cpu" and setup["devices"].count(device) > 1:
        # As where several GPUs are tried out on one: NCCL wants them to be on machines of their own then.
        wanted["NCCL_HOSTID"] = f"rank {rank}"
    if any("expandable_segments:True" in os.environ.get(name, "") for name in ALLOCATOR):
        # What a CUDA graph exchanges NCCL registers, as if it lay in one piece of memory, which it then may not: ranks
        # wait for each other for ever.
        wanted["NCCL_GRAPH_REGISTER"] = "0"
    return wanted


def network_of(address: str) -> str | None:
    """The name of the network that this machine's address is of; None for one such as 127.0.0.2, which none lists."""
    address = socket.gethostbyname(address)
    networks = psutil.net_if_addrs().items()
    return next((name for name, own in networks if address in (each.address for each in own)), None)


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
