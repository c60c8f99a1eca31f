"""Starting a kernel while the one before it ends (programmatic dependent launch), which GPUs know from Hopper on.

A kernel launched so calls gdc_wait before it reads or writes anything but constant tables, then gdc_launch_dependents,
which lets the next one in: only launches overlap. Weights, too, are read after the wait: a host that loads, clones or
patches one may write its codes or groups right before the product.
"""

import torch


def early(x: torch.Tensor) -> dict[str, bool]:
    """Launch options of a kernel with the constant EARLY, for tensors like x."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0):
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}
