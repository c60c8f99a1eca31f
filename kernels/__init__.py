"""Kernels in torch and Triton. Each op has a plain-torch reference: the CPU runs it, and tests compare with it."""
