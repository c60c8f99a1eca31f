"""The fused products of few rows with an INT4 weight, by name, and the one that int4.linear takes."""

from functools import partial

from . import int4_linear_triton, int4_terms_triton

CANDIDATES = {
    "pairs": int4_linear_triton.linear,
    "load": partial(int4_terms_triton.linear, lookup="load"),
    "shuffle": partial(int4_terms_triton.linear, lookup="shuffle"),
}


DEFAULT = "pairs"  # the others are faster by their instruction counts; no GPU has run them yet


def linear(x, codes, groups, scales, bias, out=None, candidate=None, **shape):
    """y [M, N] of contiguous x [M, K] fp16 or bf16, K a multiple of 128, into `out` if given; see int4.linear.

    candidate: one of CANDIDATES, None for DEFAULT. shape: launch parameters of that candidate.
    """
    return CANDIDATES[candidate or DEFAULT](x, codes, groups, scales, bias, out, **shape)
