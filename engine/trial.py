"""Attention on random heads of a picture's size, by any backend, as the forward calls it: to compile and to measure."""

import contextlib
import functools
import logging
from collections.abc import Callable

import torch

from ..kernels import attention_fp8
from ..kernels.attention import ATTENTION, AttentionRequest
from ..kernels.heads import quantise_heads
from ..kernels.registry import Backend
from .rehearsal import Rehearsal, begun

# A 1024x1024 picture with a short prompt. Smaller ones take what is best here: measured eagerly they would only show
# what a launch costs.
TOKENS = 64 * 65


class Trial:
    """request: what backends are chosen by; dtype: of q, k and v."""

    def __init__(self, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int):
        self.request = AttentionRequest(
            device=device, dtype=dtype, batch=1, heads=heads, tokens=TOKENS, keys=TOKENS, head_dim=head_dim
        )

    @functools.cached_property
    def tensors(self) -> list[torch.Tensor]:
        """q, k and v."""
        shape = (1, TOKENS, self.request.heads, self.request.head_dim)
        make = functools.partial(torch.randn, device=self.request.device, dtype=self.request.dtype)
        return [make(shape).transpose(1, 2) for _ in range(3)]

    def function(self, backend: Backend) -> Callable[..., torch.Tensor]:
        """What the forward calls on q, k, v and lengths; of q and k the codes are there, from the norm before."""
        if backend.name not in attention_fp8.KERNELS:
            return backend.function
        q, k, v = self.tensors
        of_codes = functools.partial(attention_fp8.attention_of_codes, backend.name, *map(quantise_heads, (q, k)), v)
        return lambda *_: of_codes()

    def compiling(self, allowed_error: float) -> Rehearsal | None:
        """The kernels of all backends that "auto" may take."""
        able = [each for each in ATTENTION.backends.values() if each.error <= allowed_error and not each.fallback]
        able = [each for each in able if each.refusal(self.request) is None]

        def call_all() -> None:
            for backend in able:
                with contextlib.suppress(Exception):
                    self.function(backend)(*self.tensors, None)

        return begun(call_all, (), self.request.device)


@functools.cache
def compiling(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, allowed_error: float
) -> Rehearsal | None:
    """`Trial.compiling`, from the first call on."""
    return Trial(device, dtype, heads, head_dim).compiling(allowed_error)


@functools.cache
def compiled(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, allowed_error: float) -> None:
    """The end of `compiling`. What fails here does so again where it is measured, and is told of there."""
    if rehearsal := compiling(device, dtype, heads, head_dim, allowed_error):
        try:
            rehearsal.wait()
        except Exception as error:
            logging.info("Z-Image-Turbo: kernels of attention were not compiled side by side: %s", error)
