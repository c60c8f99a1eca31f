"""Prints one line of JSON about the Python it is run with: torch, its devices, and missing packages.

Run by the launcher with the Python that would run ComfyUI: ``python probe.py [--requirements FILE]``.
``torch`` is null when it is not installed; ``torch_error`` holds the reason when it is there but cannot be imported.
Memory is in bytes.
"""

import argparse
import json
import re
import sys
from importlib import metadata, util


def missing_distributions(text):
    """Return the names in a requirements file that have no installed distribution; versions are not compared."""
    missing = []
    for line in text.splitlines():
        name = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", line)
        if name is None or ";" in line:  # an environment marker is for pip to judge
            continue
        try:
            metadata.distribution(name[1])
        except metadata.PackageNotFoundError:
            missing.append(name[1])
    return missing


def torch_facts():
    if util.find_spec("torch") is None:
        return {"torch": None, "torch_error": None}
    try:
        import torch
    except Exception as error:  # a broken build raises anything; the text is the finding
        return {"torch": None, "torch_error": f"{type(error).__name__}: {error}"}
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        devices.append({"name": torch.cuda.get_device_name(index), "free": free, "total": total})
    other = [name for name in ("mps", "xpu") if getattr(torch, name, None) and getattr(torch, name).is_available()]
    return {
        "torch": torch.__version__,
        "torch_error": None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": devices,
        "other_accelerators": other,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requirements", help="requirements.txt whose packages must be there")
    options = parser.parse_args()
    missing = []
    if options.requirements:
        with open(options.requirements, encoding="utf-8") as file:
            missing = missing_distributions(file.read())
    facts = {"python": ".".join(map(str, sys.version_info[:3])), "executable": sys.executable, "missing": missing}
    print(json.dumps({**facts, **torch_facts()}))


if __name__ == "__main__":
    main()
