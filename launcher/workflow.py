"""Reads workflow files and changes single inputs of them (``--set node.input=value``)."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from . import schema
from .report import LauncherError

Prompt = dict[str, dict[str, Any]]
"""ComfyUI's API format: node id → {"class_type": …, "inputs": {name: value or [node id, output index]}}."""


def read(path: Path) -> dict[str, Any]:
    """Read a workflow file of either format. Raises LauncherError when it is neither."""
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LauncherError(f"the workflow {path} cannot be read: {error.strerror}", "check the path") from error
    except ValueError as error:
        raise LauncherError(
            f"{path} is not a workflow: it is not valid JSON ({error})", "save the workflow again from the editor"
        ) from error
    if not is_editor_format(graph) and not is_api_format(graph):
        raise LauncherError(
            f"{path} is JSON but not a ComfyUI workflow",
            "save it from the editor with Workflow > Save or Workflow > Export (API)",
        )
    return graph


def is_editor_format(graph: Any) -> bool:
    return isinstance(graph, dict) and isinstance(graph.get("nodes"), list)


def is_api_format(graph: Any) -> bool:
    nodes = graph.values() if isinstance(graph, dict) else ()
    return bool(nodes) and all(isinstance(node, dict) and "class_type" in node and "inputs" in node for node in nodes)


def title(node: dict[str, Any]) -> str:
    """Return the name under which the editor shows a node."""
    return node.get("_meta", {}).get("title") or node["class_type"]


@dataclasses.dataclass(frozen=True)
class Change:
    """One ``--set``: ``target`` is ``node.input`` as typed, ``text`` the value as typed."""

    target: str
    text: str

    @classmethod
    def parse(cls, argument: str) -> "Change":
        target, equals, text = argument.partition("=")
        if not equals or not target.strip(".") or "." not in target:
            raise LauncherError(
                f"--set {argument} cannot be read", "write it as node.input=value, for example --set KSampler.steps=8"
            )
        return cls(target, text)


def find_node(prompt: Prompt, target: str) -> tuple[str, str]:
    """Split ``node.input`` into (node id, input name). The node is named by id, title or class.

    A title may hold dots itself, so every dot is tried, the leftmost first. Raises LauncherError when no node or more
    than one fits.
    """
    dots = [index for index, letter in enumerate(target) if letter == "."]
    for dot in dots:
        name, input_name = target[:dot], target[dot + 1 :]
        for hits in (
            [key for key in prompt if key == name],
            [key for key, node in prompt.items() if title(node) == name],
            [key for key, node in prompt.items() if node["class_type"] == name],
        ):
            if len(hits) > 1:
                raise LauncherError(
                    f"--set {target}: {len(hits)} nodes are called '{name}'",
                    f"name one of them by its id: {', '.join(f'{key}.{input_name}' for key in hits)}",
                )
            if hits:
                return hits[0], input_name
    known = "; ".join(f"{key} = {title(node)} ({node['class_type']})" for key, node in prompt.items())
    raise LauncherError(
        f"--set {target}: the workflow has no node of that id, title or class", f"use one of these nodes: {known}"
    )


def apply(prompt: Prompt, changes: list[Change], object_info: dict[str, Any]) -> Prompt:
    """Return ``prompt`` with the changes made; ``object_info`` tells which inputs a node has and their types."""
    changed = copy.deepcopy(prompt)
    for change in changes:
        key, name = find_node(changed, change.target)
        node = changed[key]
        spec = schema.inputs(object_info.get(node["class_type"], {}), node["inputs"])
        known = {**dict.fromkeys(node["inputs"]), **spec}
        if name not in known:
            raise LauncherError(
                f"--set {change.target}: node {key} ({title(node)}) has no input '{name}'",
                f"use one of its inputs: {', '.join(known)}",
            )
        node["inputs"][name] = parse_value(change.text, schema.type_name(known[name]) if known[name] else None)
    return changed


def parse_value(text: str, type_name: str | None) -> Any:
    """Read ``text`` as JSON where that is possible, else as plain text; a STRING input takes plain text as it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if type_name == "STRING" and not isinstance(value, str) else value
