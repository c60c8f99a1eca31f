"""LoRA and other weight patches of a MODEL as plain trees, for processes that hold the same model.

A tree is made of what `wire` sends: dicts, lists, strings, numbers, tensors. The host tells lists from tuples in a
patch, and knows adapters by class: {"tuple": […]} and {"adapter": its name, …} stand for these.
"""

import uuid
from typing import Any

from comfy.weight_adapter import WeightAdapterBase, adapters

ADAPTERS = {adapter.name: adapter for adapter in adapters}


def as_tree(model) -> dict[str, Any]:
    """The patches of a MODEL with what identifies them. Raises ValueError for one that is more than values."""
    return {
        "uuid": str(model.patches_uuid),
        "patches": {key: [_patch(key, *patch) for patch in patches] for key, patches in model.patches.items()},
    }


def patched(model, tree: dict[str, Any]):
    """A clone of a MODEL that has these patches and no others."""
    clone = model.clone()
    clone.patches = {
        key: [tuple(map(_restored, patch)) for patch in patches] for key, patches in tree["patches"].items()
    }
    clone.patches_uuid = uuid.UUID(tree["uuid"])
    return clone


def _patch(key: str, strength: float, value: Any, strength_model: float, offset: tuple | None, function: Any) -> list:
    if function is not None:
        raise ValueError(f"the patch of {key} comes with code, which no other process gets.")
    if isinstance(value, list):  # the host's form for a patch of a patch
        raise ValueError(f"the patch of {key} is made of patches of another model, which no other process has.")
    if isinstance(value, WeightAdapterBase) and ADAPTERS.get(value.name) is not type(value):
        raise ValueError(f"the patch of {key} is of a kind that ComfyUI does not bring: {type(value).__name__}.")
    return [strength, _plain(value), strength_model, _plain(offset), None]


def _plain(value: Any) -> Any:
    if isinstance(value, WeightAdapterBase):
        return {"adapter": value.name, "keys": sorted(value.loaded_keys), "weights": _plain(value.weights)}
    return {"tuple": list(map(_plain, value))} if isinstance(value, tuple) else value


def _restored(value: Any) -> Any:
    if isinstance(value, dict) and "adapter" in value:
        return ADAPTERS[value["adapter"]](set(value["keys"]), _restored(value["weights"]))
    if isinstance(value, dict) and "tuple" in value:
        return tuple(map(_restored, value["tuple"]))
    return value
