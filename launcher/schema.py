"""What a node's entry in the server's ``/object_info`` says about its inputs, in the editor's order."""

from typing import Any

DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
WIDGET_TYPES = frozenset({"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC_COMBO})
SEED_NAMES = frozenset({"seed", "noise_seed"})

Spec = list
"""``[type, options]``: the type is a name, or a list of choices for an old-style combo; options may be missing."""


def type_name(spec: Spec) -> str:
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def options(spec: Spec) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}


def is_widget(spec: Spec) -> bool:
    """Whether the editor shows the input as a field, whose value stands in ``widgets_values``."""
    return type_name(spec) in WIDGET_TYPES and not options(spec).get("forceInput")


def has_seed_control(name: str, spec: Spec) -> bool:
    """Whether the editor adds a "control after generate" field, with a value of its own, behind this one."""
    control = options(spec).get("control_after_generate")
    return bool(control) or (control is None and name in SEED_NAMES and type_name(spec) == "INT")


def inputs(node_info: dict[str, Any], values: dict[str, Any]) -> dict[str, Spec]:
    """Return name → spec of a node's inputs in order, with the inputs that the current ``values`` reveal.

    An option of a dynamic combo brings inputs of its own; they are called ``<combo>.<input>``.
    """
    found: dict[str, Spec] = {}

    def add(fields: list[tuple[str, Spec]]) -> None:
        for name, spec in fields:
            found[name] = spec
            add(revealed(name, spec, values.get(name)))

    add(ordered(node_info))
    return found


def ordered(node_info: dict[str, Any]) -> list[tuple[str, Spec]]:
    """Return (name, spec) of the required and then the optional inputs, without those that options reveal."""
    groups = node_info.get("input", {})
    order = node_info.get("input_order", {})
    return [
        (name, groups[group][name])
        for group in ("required", "optional")
        if group in groups
        for name in order.get(group, groups[group])
    ]


def revealed(name: str, spec: Spec, value: Any) -> list[tuple[str, Spec]]:
    """Return the inputs that a dynamic combo ``name`` shows when it is set to ``value``; none for other inputs."""
    if type_name(spec) != DYNAMIC_COMBO:
        return []
    chosen = next((option["inputs"] for option in options(spec)["options"] if option["key"] == value), {})
    return [(f"{name}.{inner}", inner_spec) for inner, inner_spec in ordered({"input": chosen})]
