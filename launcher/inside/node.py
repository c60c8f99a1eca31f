"""Brings another machine's devices into a group: runs its share of the ranks for as long as the group is there.

ZIMAGE_GROUP_TOKEN=… python node.py http://10.0.0.1:17860 --address 10.0.0.2 --devices cuda:0,cuda:1

The URL is that of ComfyUI's machine, --address this one's as seen from there. Pack, ComfyUI, model files and Python
environment lie in the same places on both. When ranks are started anew there, they are here; until ComfyUI wants ranks,
and after it has ended, this waits.
"""

import argparse
import http.client
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
WAIT_SECONDS = 1.0
ANSWER_SECONDS = 10.0

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("coordinator", help="URL of the group on ComfyUI's machine")
    parser.add_argument("--address", required=True, help="of this machine, as the others reach it")
    parser.add_argument("--devices", required=True, help="with commas: cuda:0,cuda:1, or cpu for each rank")
    arguments = parser.parse_args()
    token = os.environ.get("ZIMAGE_GROUP_TOKEN") or parser.error("ZIMAGE_GROUP_TOKEN is not set")
    said = None
    while True:
        try:
            wanted, state = asked(arguments.coordinator, token), "The group is there: starting."
        except (OSError, http.client.HTTPException, ValueError) as error:  # it may end while it answers
            if isinstance(error, urllib.error.HTTPError) and error.code == 403:
                sys.exit("The group refused the token: ZIMAGE_GROUP_TOKEN differs on the two machines.")
            wanted, state = None, f"Waiting until multi-gpu is used there ({error})."
        if state != said:
            print(state, flush=True)
            said = state
        if wanted is not None:
            run(wanted, token, arguments.address, arguments.devices.split(","))
        time.sleep(WAIT_SECONDS)


def asked(coordinator: str, token: str) -> dict:
    """What the group tells its ranks, and torchrun's options. Raises OSError where there is none, HTTPException or
    ValueError where the answer is cut off."""
    request = urllib.request.Request(f"{coordinator}/setup", headers={"Authorization": f"Bearer {token}"})
    with _direct.open(request, timeout=ANSWER_SECONDS) as answer:
        return json.load(answer)


def run(wanted: dict, token: str, address: str, devices: list[str]) -> None:
    """This machine's ranks; returns when they have ended."""
    told = wanted["told"] | {"address": address, "devices": devices}
    environment = os.environ | {"ZIMAGE_GROUP": json.dumps(told), "ZIMAGE_GROUP_TOKEN": token}
    environment.pop("PYTHONSAFEPATH", None)  # the programs beside this one import their neighbours
    environment.setdefault("ZIMAGE_COMFYUI", wanted["comfyui"])
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // len(devices))))
    for name, value in (("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0"), ("MALLOC_ARENA_MAX", "1")):  # as engine/group/launch
        environment.setdefault(name, value)
    shape = ["--local-addr", address, "--nproc-per-node", str(len(devices)), "--rdzv-conf", "is_host=0"]
    agent = [sys.executable, "-u", str(HERE / "agent.py"), *wanted["torchrun"], *shape, str(HERE / "rank.py")]
    subprocess.run(agent, env=environment, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
