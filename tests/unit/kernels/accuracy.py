"""How kernels are held against their references: devices, poisoned outputs, errors."""

import pytest
import torch

GPU = torch.cuda.is_available()


def on_devices(cpu: list, cuda: list):
    """Parametrises (device, size): small sizes in Triton's interpreter without a GPU, these and `cuda`'s on a GPU."""
    interpreted = pytest.mark.skipif(GPU, reason="Triton's interpreter is for machines without an NVIDIA GPU")
    compiled = pytest.mark.skipif(not GPU, reason="no NVIDIA GPU")
    cases = [pytest.param("cpu", size, marks=interpreted, id=f"cpu-{_readable(size)}") for size in cpu]
    cases += [pytest.param("cuda", size, marks=compiled, id=f"cuda-{_readable(size)}") for size in cpu + cuda]
    return pytest.mark.parametrize(("device", "size"), cases)


def normal(*shape, device, dtype=torch.float32, spread=1.0):
    """Fresh normal numbers, rounded to the dtype."""
    return (torch.randn(shape, device=device) * spread).to(dtype)


def poisoned(shape, dtype, device):
    """A tensor of NaN: what a kernel leaves unwritten is seen."""
    return torch.full(tuple(shape), float("nan"), device=device).to(dtype)


def storable(dtype, device):
    """The dtype to have a kernel's result in: the interpreter truncates bf16 at a store, where a GPU rounds."""
    return torch.float32 if device == "cpu" and dtype == torch.bfloat16 else dtype


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """‖ours - exact‖ / ‖exact‖ in float64; a NaN or infinity on either side fails."""
    ours, exact = ours.double(), exact.double()
    assert torch.isfinite(ours).all(), f"{(~torch.isfinite(ours)).sum()} values are not finite"
    assert torch.isfinite(exact).all()
    return ((ours - exact).norm() / exact.norm()).item()


def same_fp8(ours, reference):
    """(codes, row scales) against the reference's: scales to fp32's last bits, codes to one unit and nearly all equal.

    The interpreter's conversion is faulty where rounding carries into the exponent: it gives half the value there.
    """
    assert error(ours[1], reference[1]) < 1e-6
    codes, expected = ours[0].float(), reference[0].float()
    apart = (ours[0].view(torch.uint8).int() - reference[0].view(torch.uint8).int()).abs()
    interpreted = ours[0].device.type == "cpu"
    assert ((codes == expected) | (apart == 1) | ((codes == expected / 2) & interpreted)).all()
    assert (codes != expected).double().mean() < (0.2 if interpreted else 0.01)


def dequantised(codes: torch.Tensor, row_scales: torch.Tensor) -> torch.Tensor:
    return codes.double() * row_scales.double().view(*codes.shape[:-1], 1)


def _readable(size) -> str:
    return "x".join(str(part) for part in size)
