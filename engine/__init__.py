"""From a node to a kernel: reading checkpoints, building the three models, the sampler's arithmetic."""
