"""Our weight formats as quantised layouts of the host: LoRA, offloading, saving, clones and training go through them.

What the bits mean stands in `kernels.int4` and `kernels.fp8`. `compute` is how a layer multiplies: in 16 bit, or with
FP8 tensor cores. It is no part of a file.
"""

import dataclasses

import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedLayout, QuantizedTensor, register_layout_class, register_layout_op
from comfy_kitchen.tensor import BaseLayoutParams

from ..kernels import fp8, int4, swiglu_linear

INT4, FP8 = "zimage_int4", "zimage_fp8"  # names that stock loaders refuse
LOADER = "Z-Image-Turbo Loader"
COMPUTE_16, COMPUTE_FP8 = "16", "fp8"


class Int4Layout(QuantizedLayout):
    """data: uint8 [N, K / 2]; scale: float32 [N]; groups: uint8 [N, K / 16]."""

    @dataclasses.dataclass(frozen=True)
    class Params(BaseLayoutParams):
        groups: torch.Tensor
        rotated: bool = False
        compute: str = COMPUTE_16
        transposed: bool = False

        def _tensor_fields(self) -> list[str]:
            return ["scale", "groups"]

    @classmethod
    def quantize(cls, tensor, scale=None, stochastic_rounding=0, inplace_ops=False, rotated=None, compute=COMPUTE_16):
        """The host asks for `scale` anew and for in-place work when it merges a LoRA; neither means anything here."""
        weight = int4.quantise(tensor, rotated, stochastic_rounding)
        shape = tuple(tensor.shape)
        params = cls.Params(weight.scales, tensor.dtype, shape, weight.groups, weight.rotated, compute)
        return weight.codes, params

    @classmethod
    def dequantize(cls, qdata, params):
        return int4.dequantise(packed(qdata, params), params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return qtensor._qdata, qtensor._params.scale, qtensor._params.groups

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata, "_scale": params.scale, "_groups": params.groups}

    @classmethod
    def requantize_kwargs(cls, qtensor):
        return {"rotated": qtensor._params.rotated, "compute": qtensor._params.compute}


class Fp8Layout(QuantizedLayout):
    """data: float8_e4m3fn [N, K]; scale: float32 [N]."""

    @dataclasses.dataclass(frozen=True)
    class Params(BaseLayoutParams):
        transposed: bool = False

    @classmethod
    def quantize(cls, tensor, scale=None, stochastic_rounding=0, inplace_ops=False):
        """See `Int4Layout.quantize`; rounding is to the nearest, since a step is small beside a LoRA's change."""
        codes, scales = fp8.quantise_weight(tensor)
        return codes, cls.Params(scales, tensor.dtype, tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata, params):
        return (qdata.to(torch.float32) * params.scale[:, None]).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata, "_scale": params.scale}


def packed(qdata: torch.Tensor, params) -> int4.Int4Weight:
    return int4.Int4Weight(qdata, params.groups, params.scale, params.rotated)


def multiply(x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] times one of our weights [N, K], the way its layout computes, without gradients."""
    params, device = weight._params, x.device
    fp8_tensor_cores = fp8.supported(device) is None
    if weight._layout_cls == Int4Layout.__name__:
        linear = int4.linear_fp8 if params.compute == COMPUTE_FP8 and fp8_tensor_cores else int4.linear
        return linear(x, packed(weight._qdata, params), bias)
    if not fp8_tensor_cores:
        return torch.nn.functional.linear(x, weight.dequantize().to(x.dtype), bias)
    rows, scales = fp8.quantise_rows(x.flatten(0, -2))
    return fp8.linear(rows, scales, weight._qdata, params.scale, bias, x.dtype).unflatten(0, x.shape[:-1])


def takes_rows(weight: torch.Tensor) -> bool:
    """Whether `multiply_rows` can run: a weight of ours that computes in FP8, on a GPU that has it."""
    ours = isinstance(weight, QuantizedTensor) and weight._layout_cls in (Int4Layout.__name__, Fp8Layout.__name__)
    if not ours or fp8.supported(weight._qdata.device) is not None:
        return False
    params = weight._params
    return weight._layout_cls == Fp8Layout.__name__ or (params.compute == COMPUTE_FP8 and not params.rotated)


def outputs(weight: torch.Tensor, some: slice) -> torch.Tensor:
    """A weight's rows for some of its outputs, of ours or of plain numbers, where they lie."""
    if not isinstance(weight, QuantizedTensor):
        return weight[some]
    params, data = weight._params, weight._qdata[some]
    changed = {name: getattr(params, name)[some] for name in params._tensor_fields()}
    params = dataclasses.replace(params, **changed, orig_shape=(len(data), params.orig_shape[1]))
    return QuantizedTensor(data, weight._layout_cls, params)


def is_int4(weight: torch.Tensor) -> bool:
    return isinstance(weight, QuantizedTensor) and weight._layout_cls == Int4Layout.__name__


def multiply_rows(codes: torch.Tensor, scales: torch.Tensor, weight: QuantizedTensor, bias=None) -> torch.Tensor:
    """FP8 rows [M, K] with scales [M, 1] times a weight that `takes_rows`: [M, N] in the weight's own type."""
    params = weight._params
    return fp8.linear(codes, scales, _fp8_codes(weight), params.scale, bias, params.orig_dtype)


def sum_rows(codes: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """`multiply_rows` of what `leaves_scales`, before it is scaled: sums [M, N] in bf16.

    Times the scale of each row and `column_scales` they are its result.
    """
    return fp8.product(codes, _fp8_codes(weight))


def gate_rows(
    codes: torch.Tensor,
    scales: torch.Tensor,
    gate_weight: QuantizedTensor,
    value_weight: QuantizedTensor,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SiLU of `multiply_rows` with one weight, times that with another, times factor: FP8 rows [M, N] with scales."""
    scaled = [(_fp8_codes(weight), weight._params.scale) for weight in (gate_weight, value_weight)]
    return swiglu_linear.linear_fp8((codes, scales), *scaled, factor, gate_weight._params.orig_dtype)


def leaves_scales(weight: QuantizedTensor, bias: torch.Tensor | None, rows: int) -> bool:
    """Whether `sum_rows` may stand for `multiply_rows` with so many rows."""
    params = weight._params
    return bias is None and fp8.multiplied_alike(weight._qdata.device, params.orig_dtype, rows, *weight.shape)


def column_scales(weight: QuantizedTensor) -> torch.Tensor:
    """fp32 [N], of the weight's outputs."""
    return weight._params.scale


def _fp8_codes(weight: QuantizedTensor) -> torch.Tensor:
    if not is_int4(weight):
        return weight._qdata
    return int4.expand(packed(weight._qdata, weight._params), torch.float8_e4m3fn)


class _OnlyOurs(dict):
    """What the host's registry knows of a format: what it asks our layers for, and nothing that its own could load by.

    Its layers, whatever node they belong to, ask for more before they read a weight, and are told who reads it.
    """

    def __init__(self, form: str):
        super().__init__(quantize_input=False)
        self.form = form

    def __missing__(self, _):
        kind = self.form.removeprefix("zimage_").upper()
        raise ValueError(
            f"This file holds weights in Z-Image-Turbo's {kind} form ({self.form}), which ComfyUI's own loaders "
            f"cannot read. Load it with the node '{LOADER}'."
        )


def register() -> None:
    """Tell the host of both layouts. May be called again."""
    for layout, name in ((Int4Layout, INT4), (Fp8Layout, FP8)):
        register_layout_class(layout.__name__, layout)
        QUANT_ALGOS[name] = _OnlyOurs(name)
        register_layout_op(torch.ops.aten.linear.default, layout)(_linear)
        register_layout_op(torch.ops.aten.t.default, layout)(_transpose)
        register_layout_op(torch.ops.aten.mm.default, layout)(_mm)
        register_layout_op(torch.ops.aten.addmm.default, layout)(_addmm)


def _linear(_, args, kwargs):
    return multiply(*args, **kwargs)


def _transpose(weight, args, kwargs):
    params = weight._params
    turned = dataclasses.replace(params, orig_shape=params.orig_shape[::-1], transposed=not params.transposed)
    return QuantizedTensor(weight._qdata, weight._layout_cls, turned)


# Training: autograd multiplies by the transposed weight forwards and by the weight itself backwards.
def _mm(_, args, kwargs):
    x, weight = args
    return torch.mm(x, weight.dequantize().to(x.dtype))


def _addmm(_, args, kwargs):
    bias, x, weight = args
    return torch.addmm(bias, x, weight.dequantize().to(x.dtype))
