"""Runs one prompt on a server through inside/client.py, and words the server's refusals and errors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import workflow
from .progress import Progress
from .python_probe import INSIDE
from .report import LauncherError
from .server import Server
from .workflow import Prompt

EDIT = "change the workflow or the inputs (--set node.input=value) and run again"


def run_prompt(server: Server, python: Path, prompt: Prompt) -> dict[str, Any]:
    """Queue ``prompt``, show its progress and return its outputs by node id.

    Raises LauncherError when the server refuses it, a node fails, it is cancelled, or the server ends.
    """
    progress = Progress({key: workflow.title(node) for key, node in prompt.items()}, sys.stdout)
    client = subprocess.Popen(
        [str(python), str(INSIDE / "client.py"), server.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    ending: dict[str, Any] = {}
    try:
        client.stdin.write(json.dumps(prompt))
        client.stdin.close()
        for line in client.stdout:
            ending = json.loads(line)
            show(ending, progress)
            if ending["event"] == "left_out":
                for problem in node_problems(json.loads(ending["body"]), prompt):
                    print(f"  Left out by ComfyUI: {problem}")
        complaint = client.stderr.read()
    finally:
        client.kill()
        client.wait()
        progress.end()
    if ending.get("event") == "finished":
        return ending["outputs"]
    server.check_alive("while it ran the workflow")
    if not ending or ending["event"] in ("accepted", "left_out", "running", "step", "cached"):
        raise LauncherError("the client that follows the prompt died", "report this", complaint)
    raise failure(ending, prompt, server.log)


def show(event: dict[str, Any], progress: Progress) -> None:
    """Hand a client's event to ``progress``; endings are judged by the caller."""
    if event["event"] == "running":
        progress.running(event["node"])
    elif event["event"] == "step":
        progress.step(event["node"], event["value"], event["max"])
    elif event["event"] == "cached":
        progress.cached(event["nodes"])


def failure(ending: dict[str, Any], prompt: Prompt, log: Path) -> LauncherError:
    """Word the last event of a prompt that did not finish. log: of the server, with the traceback of an error."""
    kind = ending["event"]
    if kind == "rejected":
        return LauncherError(
            f"ComfyUI refused the workflow (HTTP {ending['status']})", EDIT, refusal(ending["body"], prompt)
        )
    if kind == "error":
        reason = f"{name_of(ending['node_id'], prompt)} failed: {ending['exception_message'].strip()}"
        return LauncherError(reason, f"{EDIT}; where in the code it failed is in {log}")
    if kind == "interrupted":
        return LauncherError("the workflow was cancelled", "run it again")
    return LauncherError(f"the connection to ComfyUI was lost: {ending['reason']}", "run it again")


def refusal(body: str, prompt: Prompt) -> str:
    """Make readable lines of the answer to a refused prompt: the error, then each node's own errors."""
    try:
        answer = json.loads(body)
        error, problems = answer["error"], node_problems(answer, prompt)
        lines = [" ".join(filter(None, [error.get("message"), "" if problems else error.get("details")]))]
    except (ValueError, KeyError, AttributeError, TypeError):  # not ComfyUI's own answer, for instance from a proxy
        return body
    return "\n".join([*lines, *problems])


def node_problems(answer: dict[str, Any], prompt: Prompt) -> list[str]:
    """A line for each error of a node in ComfyUI's answer to a prompt."""
    return [
        f"{name_of(key, prompt)}: {item['message']}: {item['details']}"
        for key, node in (answer.get("node_errors") or {}).items()
        for item in node["errors"]
    ]


def name_of(key: str, prompt: Prompt) -> str:
    """Return ``node 3 (title)``, or ``node 3`` for one that the workflow itself does not hold."""
    return f"node {key} ({workflow.title(prompt[key])})" if key in prompt else f"node {key}"
