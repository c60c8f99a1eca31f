"""The host's layers with ours among the formats that a Linear can hold."""

import json

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from . import layouts

MARKER = "comfy_quant"


def mark(form: str, rotated: bool = False) -> torch.Tensor:
    """What stands beside a weight to say how it is stored."""
    settings = {"format": form} | ({"rotated": True} if rotated else {})
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def _parameter(weight: QuantizedTensor) -> QuantizedTensor:
    """As torch.nn.Parameter makes one of a tensor of another class, without its `detach`, which copies a part of it."""
    weight._is_param = True
    return weight


def operations(dtype: torch.dtype, compute: str):
    """Layers as `custom_operations` of the host. dtype: of what is not quantised; compute: how int4 multiplies."""
    layouts.register()
    base = comfy.ops.mixed_precision_ops({}, dtype)

    class Operations(base):
        class Linear(base.Linear):
            def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *rest):
                marker = state_dict.get(prefix + MARKER)
                settings = json.loads(bytes(marker.tolist())) if marker is not None else {}
                if settings.get("format") not in (layouts.INT4, layouts.FP8):
                    super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, *rest)
                    return
                taken = {
                    name: state_dict.pop(prefix + name, None) for name in ("weight", "weight_scale", "weight_groups")
                }
                del state_dict[prefix + MARKER]
                self.quant_format = settings["format"]
                if self.quant_format == layouts.INT4:
                    layout, options = (
                        layouts.Int4Layout,
                        (taken["weight_groups"], settings.get("rotated", False), compute),
                    )
                else:
                    layout, options = layouts.Fp8Layout, ()
                self.layout_type = layout.__name__
                params = layout.Params(taken["weight_scale"], dtype, self._orig_shape, *options)
                self.weight = _parameter(QuantizedTensor(taken["weight"], self.layout_type, params))
                torch.nn.Module._load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, *rest)
                missing_keys[:] = [key for key in missing_keys if key != f"{prefix}weight"]

            def state_dict(self, *args, destination=None, prefix="", **kwargs):
                state = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
                if isinstance(self.weight, QuantizedTensor) and getattr(self.weight._params, "rotated", False):
                    state[prefix + MARKER] = mark(self.quant_format, rotated=True)
                return state

    return Operations
