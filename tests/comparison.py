"""The stock way to sample, and how far two latents are apart."""

import torch


def stock_sample(patcher, positive, latent, seed, steps=8):
    """ModelSamplingAuraFlow(3) + KSampler(euler, simple, cfg 1), as in the official workflow: the latent tensor."""
    # Not at the top: who only compares, as eight processes at once in test_sequence.py, needs none of the host's nodes.
    import comfy_extras.nodes_model_advanced as advanced

    import nodes

    shifted = advanced.ModelSamplingAuraFlow().patch_aura(patcher, 3.0)[0]
    zero = nodes.ConditioningZeroOut().zero_out(positive)[0]
    return nodes.KSampler().sample(shifted, seed, steps, 1.0, "euler", "simple", positive, zero, latent)[0]["samples"]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """‖ours - theirs‖ / ‖theirs‖; a NaN or infinity on either side fails."""
    assert torch.isfinite(ours).all() and torch.isfinite(theirs).all()
    return ((ours - theirs).norm() / theirs.norm()).item()
