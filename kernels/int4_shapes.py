"""The 32 shapes of the INT4 format: for each, the 16 values that a code can stand for, as FP8 (e4m3fn) bytes.

A constant of the format: changing it changes the meaning of every file. benchmarks/int4_shapes.py fitted it. Each row
is sorted by value. Magnitudes lie in [2, 256) (the levels in (-2, 2) of the fit, times 128), so that 7 binades lower
they are still normal numbers of the format.
"""

from functools import lru_cache

import torch

SHAPES = (
    "f7f4f1eeebe7e1d8405962686c707274",
    "f5f3f1eeeae5ddc05b64696c70727577",
    "f6f4f2efece8e3dbc05a62686b6e7173",
    "f1ece9e6e2ddd5c0545d6266696c6f71",
    "f6f1efece9e4e0d8c2525e64696c7072",
    "efece9e6e1dbd145575e6265686a6c6f",
    "f4f2f0ece9e6e1d9c2566065696d7073",
    "f1eeeae6e1dace45565e62676a6d7273",
    "f3efebe9e5e1dbd2c0505a6165696c73",
    "f2eeebe8e3ddd149596065696c6f7476",
    "f7f5f3f0ede9e3d94a5e656a6e717376",
    "f0edeae8e4dfd7c44e5b62666a6c7174",
    "f3f1eeebe8e3ded440585f64686b6e70",
    "f5f2efebe7e1d7495c63696c70737577",
    "f4f2edeae6e2dbd145585f63686b6d70",
    "f7f3f1edeae5dece5661686b6f727577",
    "f1efebe8e4e0dad1c050596064686a70",
    "f6f0ece8e3ded34a5b62676a6d707375",
    "f6f3f1edeae6e1d9c05861666a6d7176",
    "f7f3f0ede9e4dcc85862686c70737677",
    "f5efedeae7e3ddd4c0545d63686b6e73",
    "f0ece9e6e1dbd140545d62676b707275",
    "f2f0eeeae7e3ded7c0545d62676a6c6f",
    "f2f0ece9e4dfd5405760666a6e717377",
    "f4f1eeebe9e4dfd4485a6166696c6f71",
    "f2eeebe8e4e0d9c8525d63676a6e7172",
    "f7f2f0edeae5ded343586065696d7175",
    "f4f2efebe8e2dbcc525f656a6e717577",
    "f7f5f2efebe8e2d9435b63686b6f7277",
    "f1edeae7e3dfd8c94f5b6165696c6f72",
    "f2efece9e5e1dacf40515a6065696b71",
    "f3f0ede9e6e1dac9535e64686b6f7174",
)
DROPS = 8


@lru_cache(maxsize=32)
def shapes(device: torch.device) -> torch.Tensor:
    """The bytes of SHAPES: [32, 16] uint8."""
    with torch.inference_mode(False):
        return torch.tensor([list(bytes.fromhex(shape)) for shape in SHAPES], dtype=torch.uint8, device=device)


@lru_cache(maxsize=32)
def levels(device: torch.device) -> torch.Tensor:
    """The values of SHAPES: [32, 16] float32, ascending in each row."""
    with torch.inference_mode(False):
        return shapes(device).view(torch.float8_e4m3fn).float()


@lru_cache(maxsize=32)
def table(device: torch.device) -> torch.Tensor:
    """The FP8 bytes that a group byte (shape << 3 | drop) gives its 16 codes: [256, 16] uint8, see int4.py."""
    with torch.inference_mode(False):
        byte = shapes(device).to(torch.int16).repeat_interleave(DROPS, 0)
        drop = torch.arange(DROPS, dtype=torch.int16, device=device).repeat(len(SHAPES))[:, None]
        return (byte - 8 * drop).to(torch.uint8)


@lru_cache(maxsize=32)
def halves(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """table() as bf16 or fp16 numbers, taken apart into bytes: [256, 2, 16] uint8, high bytes first.

    Every FP8 value is exact in both types. Codes are looked up by byte permutation, one half of the number at a time.
    """
    with torch.inference_mode(False):
        values = table(device).view(torch.float8_e4m3fn).to(dtype).view(torch.uint8).view(256, 16, 2)
        return torch.stack([values[..., 1], values[..., 0]], 1).contiguous()
