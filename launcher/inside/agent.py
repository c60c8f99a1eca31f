"""torchrun, tied to the process that starts it: ``python agent.py [torchrun's options] rank.py``."""

import runpy
import sys

import lifeline

if __name__ == "__main__":
    lifeline.hold()
    sys.path.pop(0)  # this folder, whose modules have common names
    runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
