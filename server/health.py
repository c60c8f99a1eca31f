"""The state of the server as one document: what runs, what it runs on, what went wrong last."""

import threading
import time
from collections import Counter

import comfy.model_management as management
import psutil
import torch
from comfy_execution.progress import NodeState, get_progress_state
from comfyui_version import __version__ as comfyui_version

from ..engine.group.coordinator import DEGRADED, FAILED
from ..engine.group.current import current
from .gpus import gpu_state

VERSION = "0.1.0"
_MIB = 1024 * 1024


def document(server) -> dict:
    """JSON-ready state; ``uptime`` is in seconds.

    ``status`` is 'ok'; 'error', when no prompt can be run; or 'degraded', when multi-gpu has not all GPUs that it was
    asked for. The last two have a ``reason``.
    """
    gpus = gpu_state()
    reason, ranks = fault(), multi_gpu(gpus)
    status = ("ok", None)
    if reason:
        status = "error", reason
    elif ranks is not None and ranks["state"] in (DEGRADED, FAILED):
        status = "degraded", f"multi-gpu: {ranks['reason'].removeprefix('multi-gpu ')}"
    return {
        **{name: said for name, said in zip(("status", "reason"), status, strict=True) if said},
        "uptime": round(time.time() - psutil.Process().create_time(), 1),
        "version": VERSION,
        "comfyui": comfyui_version,
        "torch": torch.__version__,
        "device": str(management.get_torch_device()),
        "loaded_models": loaded_models(),
        "memory": memory(gpus),
        **({"multi_gpu": ranks} if ranks else {}),
        "queue": queue(server),
        "last_error": last_error(server.prompt_queue),
    }


def fault() -> str | None:
    """Why no prompt can be run, or None."""
    device = management.get_torch_device()
    if device.type == "cuda":
        try:
            torch.cuda.mem_get_info(device)
        except RuntimeError as error:  # after a kernel fault every CUDA call of the process fails
            return f"CUDA does not answer: {str(error).splitlines()[0]} Restart ComfyUI."
    # After CUDA, which may be what the worker died of.
    if not any("prompt_worker" in thread.name for thread in threading.enumerate()):
        return "The prompt worker is not running: it starts, or it has died. If this stays, restart ComfyUI."
    return None


def loaded_models() -> list[dict]:
    """The models that the host holds: class, device, MiB held there and in all, and ours by the path that ran."""
    # A model may be freed meanwhile: each entry refers to its patcher weakly, so it is looked up once.
    held = [(entry.device, entry.model) for entry in list(management.current_loaded_models)]
    return [
        {
            "model": type(patcher.model).__name__,
            "device": str(device),
            "loaded_mib": round(patcher.loaded_size() / _MIB),
            "size_mib": round(patcher.model_size() / _MIB),
            **_forwards(patcher.model),
        }
        for device, patcher in held
        if patcher is not None
    ]


def _forwards(model) -> dict:
    """How many evaluations took the fast path, and why the others did not, where one of our classes counts them."""
    counted = (vars(module).get("forwards") for module in model.modules())
    return next(({"forwards": dict(counts)} for counts in counted if isinstance(counts, Counter)), {})


def multi_gpu(gpus: list[dict]) -> dict | None:
    """The state of the processes on several GPUs, each with its GPU's if it is one of `gpus`; None without any."""
    state = current.document()
    if state is None:
        return None
    by_uuid = {gpu["uuid"]: gpu for gpu in gpus if "uuid" in gpu}
    ranks = [rank | ({"gpu": by_uuid[rank["uuid"]]} if rank.get("uuid") in by_uuid else {}) for rank in state["ranks"]]
    return state | {"ranks": ranks}


def memory(gpus: list[dict]) -> dict:
    """In MiB: this process and the machine's RAM; and each GPU as its driver sees it."""
    ram = psutil.virtual_memory()
    return {
        "process_mib": round(psutil.Process().memory_info().rss / _MIB),
        "ram_available_mib": round(ram.available / _MIB),
        "ram_total_mib": round(ram.total / _MIB),
        "gpus": gpus,
    }


def queue(server) -> dict:
    """How many prompts run and wait, and how far the running one's node is."""
    running, waiting = server.prompt_queue.get_current_queue_volatile()
    state = {"running": len(running), "pending": len(waiting)}
    if running:
        _, prompt_id, prompt, *_ = running[0]
        state["current"] = {"prompt_id": prompt_id, **_current_node(prompt)}
    return state


def _current_node(prompt: dict) -> dict:
    for node_id, progress in list(get_progress_state().nodes.items()):
        if progress["state"] is NodeState.Running and node_id in prompt:
            return {"node": prompt[node_id]["class_type"], "progress": [progress["value"], progress["max"]]}
    return {}


def last_error(prompt_queue) -> dict | None:
    """The most recent failed prompt in the history: node, message and time in seconds since 1970."""
    for prompt_id, entry in reversed(list(prompt_queue.get_history(max_items=100).items())):
        for event, details in (entry.get("status") or {}).get("messages", []):
            if event == "execution_error":
                return {
                    "prompt_id": prompt_id,
                    "node": details.get("node_type"),
                    "error": details.get("exception_message", "").strip(),
                    "time": details.get("timestamp", 0) / 1000,
                }
    return None
