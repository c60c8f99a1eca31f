"""INT4 weights: 4.5 bits a weight, each of which is an FP8 number times a power of two.

The format. A weight W [N, K], K a multiple of 16, is held as

    codes   uint8 [N, K/2]    bits 0..3 of byte j: the code q of column 2j; bits 4..7: that of column 2j + 1
    groups  uint8 [N, K/16]   one byte for 16 columns: bits 3..7 the shape s (0..31), bits 0..2 the drop d (0..7)
    scales  float32 [N]       a power of two for each row; 0 for a row of zeros
    rotated                   whether the row was rotated before it was stored (hadamard.py; K a multiple of 256)

With t = SHAPES[s][q], one of the 512 FP8 (e4m3fn) bytes of int4_shapes.py, a weight is decoded as

    byte      = t - 8 * d                             d binades below what the shape says
    W[n, k]   = value of byte as e4m3fn * scales[n]   times the rotation of its block of 256 columns, if rotated

So a shape is a codebook of 16 numbers, of which a group takes the best; the drop is the group's own power of two. A
weight has 4 significant bits: FP8 holds it exactly but for the row's scale, bf16 holds it with the scale, and the
16-bit and the FP8 product multiply with identical weights. Magnitudes of bytes lie in [2^-6, 240]: none is subnormal,
and none is 0 but in a row whose scale is.

The quantiser minimises the squared error over all shapes and the three drops that can win. Rotation makes heavy tails
and outlier columns Gaussian, for the price of rotating the activations; it is chosen only where it earns that.

Backends take the parts of a weight, in its stored basis:

    INT4_SEARCH   (weight [N, K] float32 contiguous, seed) -> codes, groups, scales; seed as stochastic_seed of quantise
    INT4_EXPAND   (codes, groups, scales, out)   writes out as expand says
    INT4_LINEAR   (x [M, K] contiguous, codes, groups, scales, bias [N] or None) -> y [M, N] in x's dtype
"""

from dataclasses import dataclass

import torch

from . import fp8, hadamard, int4_reference
from .arguments import FLOATS, FP8, described
from .registry import Registry, Request, lazily, no_refusal, product_request, triton_refusal, weight_request

GROUP = 16
ROTATION_GAIN = 0.95  # rotate where the error falls below this share of the plain one
MEASURED_ROWS = 256
FUSED_ROWS = 64  # up to here reading the weights is what a product costs
INT4_SEARCH = Registry("int4_search")
INT4_EXPAND = Registry("int4_expand")
INT4_LINEAR = Registry("int4_linear")


@dataclass(frozen=True)
class Int4Weight:
    """A weight [N, K] in the format of this module; the tensors are contiguous and on one device.

    Raises ValueError if the parts do not belong together, or lie on a GPU where 128-bit loads cannot reach them.
    """

    codes: torch.Tensor
    groups: torch.Tensor
    scales: torch.Tensor
    rotated: bool

    def __post_init__(self):
        if self.codes.ndim != 2:
            raise ValueError(f"Int4Weight.codes: expected uint8 [N, K/2], got {described(self.codes)}")
        rows, columns = self.shape
        expected = {
            "codes": ((rows, columns // 2), torch.uint8),
            "groups": ((rows, columns // GROUP), torch.uint8),
            "scales": ((rows,), torch.float32),
        }
        for name, (shape, dtype) in expected.items():
            part = getattr(self, name)
            fits = part.shape == shape and part.dtype == dtype and part.is_contiguous()
            if not fits or part.device != self.codes.device:
                raise ValueError(
                    f"Int4Weight.{name}: expected a contiguous {list(shape)} of {dtype} on {self.codes.device} for "
                    f"codes of {list(self.codes.shape)}, got {described(part)}"
                )
            if part.is_cuda and part.data_ptr() % 16:
                raise ValueError(
                    f"Int4Weight.{name}: expected an address that is a multiple of 16, got {part.data_ptr()}; clone it"
                )
        _check_columns(columns, self.rotated)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.codes.shape[0], self.codes.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.groups.nbytes + self.scales.nbytes


def quantise(
    weight: torch.Tensor, rotate: bool | None = None, stochastic_seed: int = 0, backend: str = "auto"
) -> Int4Weight:
    """The INT4 form of least squared error of weight [N, K] (bf16, fp16 or fp32).

    rotate: None measures up to 256 rows both ways and rotates if that lowers the relative L2 error by more than 5 %.
    stochastic_seed: if not 0, a weight goes to one of its two neighbouring levels at random so that its mean is kept
    (between the outermost levels), as a merged LoRA wants. Raises ValueError on another shape or dtype, on a K that is
    no multiple of 16 (256 to rotate), and on weights that are not finite.
    """
    if weight.ndim != 2 or weight.dtype not in FLOATS:
        raise ValueError(f"int4.quantise: expected a weight [N, K] of bf16, fp16 or fp32, got {described(weight)}")
    _check_columns(weight.shape[1], rotated=bool(rotate))
    if not torch.isfinite(weight).all():
        raise ValueError(f"int4.quantise: the weight {list(weight.shape)} holds NaN or infinity; mend it before")
    if rotate is None:
        rotate = _rotation_pays(weight, backend)
    search = INT4_SEARCH.choose(backend, Request(weight.device)).function
    rows = int4_reference.CHUNK // weight.shape[1] + 1
    parts = []
    for index, chunk in enumerate(weight.split(rows)):
        chunk = chunk.float()
        seed = stochastic_seed + index if stochastic_seed else 0
        parts.append(search((hadamard.rotate(chunk) if rotate else chunk).contiguous(), seed))
    codes, groups, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return Int4Weight(codes, groups, scales, rotate)


def expand(
    weight: Int4Weight, dtype: torch.dtype, out: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """The weight [N, K] in its stored basis: the decoding of the module's docstring, without undoing a rotation.

    dtype float8_e4m3fn gives the FP8 bytes: row n is still to be multiplied by scales[n]. bf16, fp16 and fp32 include
    the scales: exact, but for weights that fp16 cannot hold. out: a contiguous [N, K] of dtype to write into. Raises
    ValueError on another dtype or out.
    """
    if dtype not in (FP8, *FLOATS):
        raise ValueError(f"int4.expand: expected dtype float8_e4m3fn, bfloat16, float16 or float32, got {dtype}")
    device = weight.codes.device
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=device)
    elif out.shape != weight.shape or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise ValueError(
            f"int4.expand: expected out to be a contiguous {list(weight.shape)} of {dtype} on {device}, "
            f"got {described(out)}"
        )
    _expand_into(out, weight.codes, weight.groups, weight.scales, backend)
    return out


def dequantise(weight: Int4Weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] in its original basis, rounded to dtype once. A rotation is undone in fp32."""
    if not weight.rotated:
        return expand(weight, dtype)
    return hadamard.rotate(expand(weight, torch.float32)).to(dtype)


def linear(
    x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None, backend: str = "auto"
) -> torch.Tensor:
    """y [..., N] = x [..., K] W^T + bias [N], computed in x's dtype (bf16, fp16, fp32) with fp32 accumulation.

    The backend "fused" decodes the weights inside the product of up to 64 rows of 16-bit x on a GPU, which then costs
    the reading of 4.5 bits a weight; "expanded" expands them first. Make a first call before capturing a CUDA graph: it
    puts the tables of the format on the device. Raises ValueError if x or bias does not fit.
    """
    rows = _checked_rows(x, weight, bias, "int4.linear")
    if weight.rotated:
        rows = hadamard.rotate(rows)
    outputs, columns = weight.shape
    request = product_request(rows.device, rows.dtype, len(rows), outputs, columns)
    product = INT4_LINEAR.choose(backend, request).function
    return product(rows, weight.codes, weight.groups, weight.scales, bias).view(*x.shape[:-1], outputs)


def expanded_linear(x, codes, groups, scales, bias):
    stored = torch.empty((len(codes), x.shape[1]), dtype=x.dtype, device=x.device)
    _expand_into(stored, codes, groups, scales)
    return torch.nn.functional.linear(x, stored, bias)


def linear_fp8(
    x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None = None, workspace: torch.Tensor | None = None
) -> torch.Tensor:
    """y [..., N] = x [..., K] W^T + bias [N] by FP8 products: x is rounded to FP8 with a scale a row, W is exact.

    It is made of ops that each have backends: hadamard.rotate_quantise_rows or fp8.quantise_rows, expand, fp8.linear.
    workspace: FP8 elements, at least N * K, which the expanded weight may overwrite. Returns x's dtype. A GPU without
    FP8 (fp8.supported) computes the same values from fp32 products. Raises ValueError if an argument does not fit.
    """
    rows = _checked_rows(x, weight, bias, "int4.linear_fp8")
    out = None
    if workspace is not None:
        count = weight.shape[0] * weight.shape[1]
        if workspace.dtype != FP8 or workspace.numel() < count or not workspace.is_contiguous():
            raise ValueError(
                f"int4.linear_fp8: expected a contiguous workspace of at least {count} elements of {FP8} for a weight "
                f"{list(weight.shape)}, got {described(workspace)}"
            )
        out = workspace.view(-1)[:count].view(weight.shape)
    x_fp8, x_scales = (hadamard.rotate_quantise_rows if weight.rotated else fp8.quantise_rows)(rows)
    y = fp8.linear(x_fp8, x_scales, expand(weight, FP8, out), weight.scales, bias, x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def relative_error(weight: torch.Tensor, quantised: Int4Weight) -> float:
    """‖dequantise(quantised) - weight‖ / ‖weight‖ in fp32."""
    weight = weight.float()
    return ((dequantise(quantised, torch.float32) - weight).norm() / weight.norm()).item()


def _rotation_pays(weight: torch.Tensor, backend: str) -> bool:
    if weight.shape[1] % hadamard.BLOCK:
        return False
    sample = weight[:: -(-len(weight) // MEASURED_ROWS)]
    if not sample.any():
        return False
    plain, rotated = (relative_error(sample, quantise(sample, rotate, backend=backend)) for rotate in (False, True))
    return rotated < ROTATION_GAIN * plain


def _expand_into(out, codes, groups, scales, backend="auto"):
    request = weight_request(out.device, out.dtype, *out.shape)
    INT4_EXPAND.choose(backend, request).function(codes, groups, scales, out)


def _check_columns(columns: int, rotated: bool) -> None:
    multiple = hadamard.BLOCK if rotated else GROUP
    if columns == 0 or columns % multiple:
        kind = "a rotated INT4" if rotated else "an INT4"
        raise ValueError(f"{kind} weight needs a K that is a multiple of {multiple}, got K = {columns}")


def _checked_rows(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None, name: str) -> torch.Tensor:
    """x as contiguous rows [M, K]."""
    if x.shape[-1] != weight.shape[1] or x.dtype not in FLOATS or x.device != weight.codes.device:
        raise ValueError(
            f"{name}: expected x [..., {weight.shape[1]}] of bf16, fp16 or fp32 on {weight.codes.device}, "
            f"got {described(x)}"
        )
    fp8.check_bias(bias, weight.shape[0], x.device, name)
    return x.reshape(-1, x.shape[-1]).contiguous()


def _expand_refusal(request):
    if request.dtype == torch.float32:
        return "gives float8_e4m3fn, bfloat16 and float16, got float32"
    return triton_refusal(request)


def _fused_refusal(request):
    """The kernels work in steps of 128 columns on tensor cores that know bf16."""
    reason = triton_refusal(request)
    if reason is not None:
        return reason
    if not 0 < request.rows <= FUSED_ROWS:
        return f"takes 1 to {FUSED_ROWS} rows, got {request.rows}"
    if request.dtype == torch.float32:
        return "takes bfloat16 and float16, got float32"
    if request.columns % 128:
        return f"takes a K that is a multiple of 128, got K = {request.columns}"
    if request.capability < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer, this one has {}.{}".format(*request.capability)
    return None


INT4_SEARCH.register("triton", lazily("int4_quantise_triton", "search"), triton_refusal)
INT4_SEARCH.register("torch", int4_reference.search, no_refusal)
INT4_EXPAND.register("triton", lazily("int4_expand_triton", "expand"), _expand_refusal)
INT4_EXPAND.register("torch", int4_reference.expand, no_refusal)
INT4_LINEAR.register("fused", lazily("int4_few_rows_triton", "linear"), _fused_refusal)
INT4_LINEAR.register("expanded", expanded_linear, no_refusal)
