"""Ties a process of the worker group to the one that started it: none may outlive ComfyUI."""

import ctypes
import os
import signal
import stat
import sys
import threading

PR_SET_PDEATHSIG = 1


def hold() -> None:
    """From now on this process ends with its parent, and when its standard input does, if that is a pipe.

    The first holds, by the kernel of Linux, for a stopped process too. The second is for other systems, and for a
    parent that was gone before this call: ComfyUI's process keeps the other end of the pipe, which torchrun hands on
    to its ranks.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if stat.S_ISFIFO(os.fstat(0).st_mode):  # on other hosts the ranks are started by hand
        threading.Thread(target=_end_with_input, name="lifeline", daemon=True).start()


def _end_with_input() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
