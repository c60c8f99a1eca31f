"""Turns a workflow as the editor saves it into the API format that the server runs.

The server's ``/object_info`` says which inputs are fields; their values stand in ``widgets_values`` in that order.
"""

from typing import Any

from . import schema
from .report import LauncherError
from .workflow import Prompt

MUTED, BYPASSED = 2, 4
NOTES = frozenset({"Note", "MarkdownNote"})
PRIMITIVE, REROUTE = "PrimitiveNode", "Reroute"
SEED_CONTROLS = frozenset({"fixed", "increment", "decrement", "randomize"})

EXPORT = "open it in the editor and save it with Workflow > Export (API), then run that file"


def to_api(graph: dict[str, Any], object_info: dict[str, Any]) -> Prompt:
    """Convert an editor workflow. Raises LauncherError for subgraphs, group nodes and unknown node classes."""
    _refuse_nested(graph)
    nodes = {node["id"]: node for node in graph["nodes"]}
    links = {link_id: (origin, slot) for link_id, origin, slot in map(_link_start, graph.get("links", []))}
    real = [node for node in graph["nodes"] if _is_real(node)]
    unknown = sorted({node["type"] for node in real} - set(object_info))
    if unknown:
        raise LauncherError(
            f"the workflow uses nodes that this ComfyUI does not have: {', '.join(unknown)}",
            "install the packs they come from, or remove them from the workflow",
        )
    return {str(node["id"]): _convert_node(node, nodes, links, object_info[node["type"]]) for node in real}


def _refuse_nested(graph: dict[str, Any]) -> None:
    subgraphs = {item["id"]: item.get("name") for item in (graph.get("definitions") or {}).get("subgraphs") or []}
    for node in graph["nodes"]:
        if node["type"] in subgraphs:
            raise LauncherError(
                f"the workflow holds the subgraph '{subgraphs[node['type']]}', which cannot be converted here", EXPORT
            )
        if node["type"].startswith(("workflow>", "workflow/")):
            raise LauncherError(
                f"the workflow holds the group node '{node['type'][9:]}', which cannot be converted here", EXPORT
            )


def _link_start(link: list | dict[str, Any]) -> tuple[int, int, int]:
    """Return (link id, origin node, origin output) of a link in the older (list) or newer (object) notation."""
    if isinstance(link, dict):
        return link["id"], link["origin_id"], link["origin_slot"]
    return link[0], link[1], link[2]


def _is_real(node: dict[str, Any]) -> bool:
    """Whether the node itself is run: notes, reroutes, primitives, muted and bypassed nodes are not."""
    return node["type"] not in NOTES | {REROUTE, PRIMITIVE} and node.get("mode", 0) not in (MUTED, BYPASSED)


def _convert_node(node: dict[str, Any], nodes: dict, links: dict, info: dict[str, Any]) -> dict[str, Any]:
    values = field_values(node, info)
    for slot in node.get("inputs") or []:
        source = _source(slot.get("link"), nodes, links)
        if source is not None:
            values[slot["name"]] = source
    title = node.get("title") or info.get("display_name") or node["type"]
    return {"class_type": node["type"], "inputs": values, "_meta": {"title": title}}


def field_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """Give the node's ``widgets_values`` the names of its fields."""
    stored = node.get("widgets_values") or []
    if isinstance(stored, dict):
        return {name: value for name, value in stored.items() if name in schema.inputs(info, stored)}
    drawn = {slot["name"] for slot in node.get("inputs") or [] if slot.get("widget")}
    left = list(stored)
    values: dict[str, Any] = {}

    def take(fields: list[tuple[str, schema.Spec]]) -> None:
        for name, spec in fields:
            # Types of other packs' own fields are not known here; the saved node marks them as fields.
            if not left or (not schema.is_widget(spec) and name not in drawn):
                continue
            values[name] = left.pop(0)
            if left and left[0] in SEED_CONTROLS and schema.has_seed_control(name, spec):
                left.pop(0)
            take(schema.revealed(name, spec, values[name]))

    take(schema.ordered(info))
    return values


def _source(link: int | None, nodes: dict, links: dict) -> Any:
    """Follow a link through what is not run; return ``[node id, output]``, a primitive's value, or None."""
    while link is not None and link in links:
        origin, output = links[link]
        node = nodes[origin]
        if node.get("mode", 0) == MUTED:
            return None
        if node["type"] == PRIMITIVE:
            return node["widgets_values"][0]
        if node["type"] == REROUTE:
            link = node["inputs"][0].get("link")
        elif node.get("mode", 0) == BYPASSED:
            link = _bypass(node, output)
        else:
            return [str(origin), output]
    return None


def _bypass(node: dict[str, Any], output: int) -> int | None:
    """Return the input link that a bypassed node hands on to ``output``: same place first, then the same type."""
    slots = node.get("inputs") or []
    wanted = node["outputs"][output]["type"]
    for slot in slots[output : output + 1] + slots:
        if wanted == "*" or slot["type"] in (wanted, "*"):
            return slot.get("link")
    return None
