"""RMSNorm with modulation, with gate and residual sum, LayerNorm with modulation, and their FP8 rows."""

import pytest
import torch

from zimage_turbo.kernels import norm, norm_triton
from zimage_turbo.kernels.arguments import FP8
from zimage_turbo.tests.unit.kernels import accuracy
from zimage_turbo.tests.unit.kernels.accuracy import error, normal, on_devices, poisoned, storable

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
sizes = on_devices(cpu=[(1, 3, 64), (2, 5, 100), (3, 2, 257)], cuda=[(2, 77, 256), (1, 4224, 3840), (2, 333, 3840)])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])


def eager(x, weight, scale):
    """As the host composes it, every step rounded to the dtype."""
    y = torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)
    return y if scale is None else y * (1 + scale.unsqueeze(1))


def eager_residual(x, h, post_weight, gate):
    h = torch.nn.functional.rms_norm(h, h.shape[-1:], post_weight, EPS)
    return x + (h if gate is None else gate.unsqueeze(1).tanh() * h)


def in_double(function, *tensors):
    return function(*(None if tensor is None else tensor.double() for tensor in tensors))


def arguments(size, device, dtype):
    batch, _, width = size
    x = normal(*size, device=device, dtype=dtype, spread=3)
    h = normal(*size, device=device, dtype=dtype, spread=7)
    weights = [1 + normal(width, device=device, spread=0.2) for _ in range(2)]
    # gates and scales are chunks of one wider tensor, as in the model: their rows lie apart
    scale, gate = normal(batch, 2 * width, device=device, dtype=dtype).chunk(2, dim=1)
    return x, h, weights[0].to(dtype), weights[1].to(dtype), scale, gate


def within_twice(ours, rounded, exact):
    """At most twice the error of the same formula in the low precision (fp32: at least of its last bits)."""
    assert error(ours, exact) <= max(2 * error(rounded, exact), 5e-7)


@sizes
@dtypes
@pytest.mark.parametrize("modulated", [True, False], ids=["scale", "plain"])
def test_rms_modulate(device, size, dtype, modulated):
    x, _, weight, _, scale, _ = arguments(size, device, dtype)
    scale = scale if modulated else None
    exact = in_double(eager, x, weight, scale)
    y = poisoned(size, storable(dtype, device), device)
    norm_triton.rms_modulate(x, weight, scale, EPS, y, None)
    within_twice(y, eager(x, weight, scale), exact)
    within_twice(norm.rms_modulate(x, weight, scale, EPS, backend="torch"), eager(x, weight, scale), exact)


@sizes
@dtypes
@pytest.mark.parametrize("gated", [True, False], ids=["gate", "plain"])
def test_residual_rms_modulate(device, size, dtype, gated):
    x, h, post_weight, next_weight, scale, gate = arguments(size, device, dtype)
    gate = gate if gated else None
    exact_sum = in_double(eager_residual, x, h, post_weight, gate)
    exact = eager(exact_sum, next_weight.double(), scale.double())
    rounded_sum = eager_residual(x, h, post_weight, gate)
    rounded = eager(rounded_sum, next_weight, scale)
    x_out, y = poisoned(size, storable(dtype, device), device), poisoned(size, dtype, device)
    norm_triton.residual_rms_modulate(x, h, post_weight, gate, next_weight, scale, EPS, 1.0, x_out, y, None)
    within_twice(x_out, rounded_sum, exact_sum)
    within_twice(y, rounded, exact)
    ours = norm.residual_rms_modulate(x, h, post_weight, gate, next_weight, scale, EPS, backend="torch")
    within_twice(ours[0], rounded_sum, exact_sum)
    within_twice(ours[1], rounded, exact)


@sizes
def test_residual_stream_in_fp32_is_updated_in_place(device, size):
    """fp16 activations beside an fp32 stream; the last block has no next norm."""
    x, h, post_weight, next_weight, scale, gate = arguments(size, device, torch.float16)
    stream = x.float() * 1e5
    exact = in_double(eager_residual, stream, h, post_weight, gate)
    again = stream.clone()
    norm_triton.residual_rms_modulate(stream, h, post_weight, gate, None, None, EPS, 1.0, stream, None, None)
    assert error(stream, exact) < 5e-7
    y = poisoned(size, torch.float16, device)
    norm_triton.residual_rms_modulate(again, h, post_weight, gate, next_weight, scale, EPS, 1.0, again, y, None)
    assert torch.equal(again, stream)
    assert error(y, eager(exact, next_weight.double(), scale.double())) < 1e-3


@sizes
def test_the_next_norm_sees_the_stream_as_rounded(device, size):
    x, h, post_weight, next_weight, scale, gate = arguments(size, device, torch.float16)
    x_out, y, again = (poisoned(size, dtype, device) for dtype in (torch.float16, torch.float32, torch.float32))
    norm_triton.residual_rms_modulate(x, h, post_weight, gate, next_weight, scale, EPS, 1.0, x_out, y, None)
    norm_triton.rms_modulate(x_out, next_weight, scale, EPS, again, None)
    assert error(y, again) < 1e-6


@sizes
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_power_of_two_on_h_is_undone_exactly(device, size, backend):
    """h and h * 2^-10, at an eps that counts: the same bits. And an h of 2e7, which fp16 holds only so."""
    x, h, post_weight, next_weight, scale, gate = arguments(size, device, torch.float16)
    run = norm.residual_rms_modulate_reference if backend == "torch" else norm_triton.residual_rms_modulate
    results = []
    for h_scale in (1.0, 2.0**-10):
        x_out, y = poisoned(size, torch.float32, device), poisoned(size, torch.float16, device)
        run(x.float(), h.float() * h_scale, post_weight, gate, next_weight, scale, 0.5, h_scale, x_out, y, None)
        results.append(x_out)
    assert torch.equal(*results)
    large = h.double() * 2.0**20
    exact = in_double(eager_residual, x, large, post_weight, gate)
    run(x.float(), h, post_weight, gate, None, None, EPS, 2.0**-20, results[0], None, None)
    assert error(results[0], exact) < 5e-7


@sizes
@dtypes
def test_layer_modulate(device, size, dtype):
    x, _, _, _, scale, _ = arguments(size, device, dtype)
    x = x + 5

    def composed(x, scale):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1))

    y = poisoned(size, storable(dtype, device), device)
    norm_triton.layer_modulate(x, scale, 1e-6, y)
    within_twice(y, composed(x, scale), in_double(composed, x, scale))
    within_twice(
        norm.layer_modulate(x, scale, 1e-6, backend="torch"), composed(x, scale), in_double(composed, x, scale)
    )


@sizes
@dtypes
def test_fp8_rows(device, size, dtype):
    """Codes and row scales give the values back within FP8's rounding; the largest of a row is ±448."""
    x, h, post_weight, next_weight, scale, gate = arguments(size, device, dtype)
    x[0, 0], h[0, 0] = 0, 0
    exact = in_double(eager, x, next_weight, scale)
    reference = norm.rms_modulate(x, next_weight, scale, EPS, quantise=True, backend="torch")
    assert error(accuracy.dequantised(*reference), exact) < 0.03
    codes, row_scales = poisoned(size, FP8, device), poisoned((size[0] * size[1], 1), torch.float32, device)
    norm_triton.rms_modulate(x, next_weight, scale, EPS, codes, row_scales)
    accuracy.same_fp8((codes, row_scales), reference)
    largest = codes.float().abs().amax(-1).flatten()
    assert largest[0] == 0 and (largest[1:] == 448).all()

    codes, row_scales = poisoned(size, FP8, device), poisoned((size[0] * size[1], 1), torch.float32, device)
    x_out = poisoned(size, torch.float32, device)
    norm_triton.residual_rms_modulate(x, h, post_weight, gate, next_weight, scale, EPS, 1.0, x_out, codes, row_scales)
    accuracy.same_fp8(
        (codes, row_scales), norm.rms_modulate(x_out, next_weight, scale, EPS, quantise=True, backend="torch")
    )


def sums_and_scales(size, device, dtype):
    """Sums of FP8 products with scales from where eps is all of a row's norm to where it is nothing."""
    batch, tokens, width = size
    sums = normal(*size, device=device, dtype=dtype, spread=1e5 if dtype != torch.float16 else 1e3)
    row_scales = torch.logspace(-12, 6, batch * tokens, device=device)[:, None]
    column_scales = 2.0 ** normal(width, device=device, spread=2) * 1e-3
    exact = sums.double() * column_scales.double() * row_scales.double().view(batch, tokens, 1)
    return sums, row_scales, column_scales, exact


def error_of_rows(ours, exact):
    """The worst of the rows' relative errors, none of which is hidden by a louder row."""
    return max(error(*pair) for pair in zip(ours.flatten(0, 1), exact.flatten(0, 1), strict=True))


OF_SUMS = {"triton": norm_triton.residual_rms_modulate, "torch": norm.residual_rms_modulate_of_sums_reference}


@sizes
@dtypes
@pytest.mark.parametrize("backend", OF_SUMS)
def test_sums_are_scaled_in_the_norm(device, size, dtype, backend):
    x, _, post_weight, next_weight, scale, gate = arguments(size, device, torch.float32)
    sums, *scales, exact = sums_and_scales(size, device, dtype)
    ours, y = poisoned(size, torch.float32, device), poisoned(size, torch.float32, device)
    run = OF_SUMS[backend]
    run(torch.zeros_like(x), sums, post_weight, gate, None, None, EPS, 1.0, ours, None, None, *scales)
    zero = torch.zeros(1, dtype=torch.float64, device=device)
    assert error_of_rows(ours, in_double(eager_residual, zero, exact, post_weight, gate)) < 2e-6
    run(x, sums, post_weight, gate, next_weight, scale, EPS, 1.0, ours, y, None, *scales)
    exact_sum = in_double(eager_residual, x, exact, post_weight, gate)
    assert error(ours, exact_sum) < 1e-6
    assert error(y, eager(exact_sum, next_weight.double(), scale.double())) < 1e-6


@sizes
def test_sums_into_fp8(device, size):
    x, _, post_weight, next_weight, scale, gate = arguments(size, device, torch.float32)
    sums, *scales, exact = sums_and_scales(size, device, torch.bfloat16)
    codes, row_scales = poisoned(size, FP8, device), poisoned((size[0] * size[1], 1), torch.float32, device)
    given = post_weight, gate, next_weight, scale, EPS, 1.0, x, codes, row_scales, *scales
    exact_sum = in_double(eager_residual, x, exact, post_weight, gate)
    norm_triton.residual_rms_modulate(x, sums, *given)
    assert error(x, exact_sum) < 1e-6
    accuracy.same_fp8((codes, row_scales), norm.rms_modulate(x, next_weight, scale, EPS, True, backend="torch"))


@sizes
@pytest.mark.parametrize("backend", OF_SUMS)
def test_rows_of_zeros_and_the_largest_sums(device, size, backend):
    """A row of zeros has the scale of a magnitude of 1e-12, and sums of FP8 products end at 448² K."""
    x, _, post_weight, _, _, gate = arguments(size, device, torch.float32)
    run = OF_SUMS[backend]
    for value, smallest in ((0.0, 1e-12), (0.0, 1e-12 / 448), (448.0**2 * 10240, 1e-12 / 448)):
        sums = torch.full(size, value, device=device, dtype=torch.bfloat16)
        row_scales = torch.full((size[0] * size[1], 1), smallest, device=device)
        column_scales = torch.full(size[-1:], smallest, device=device)
        ours = poisoned(size, torch.float32, device)
        given = post_weight, gate, None, None, EPS, 1.0, ours, None, None, row_scales, column_scales
        run(x, sums, *given)
        assert (ours - x).abs().max() < 1e-16  # that of sums of 1e-20 under the root of eps
        column_scales.fill_(1)
        run(x, sums, *given)
        exact = in_double(eager_residual, x, sums.double() * smallest, post_weight, gate)
        assert error(ours, exact) < 5e-7


@sizes
@pytest.mark.parametrize("backend", OF_SUMS)
def test_a_power_of_two_on_the_scales_of_rows_is_undone_exactly(device, size, backend):
    """As fp16 needs it on h; there sums are bf16 all the same, and y is not."""
    x, _, post_weight, next_weight, scale, gate = arguments(size, device, torch.float32)
    sums, row_scales, column_scales, _ = sums_and_scales(size, device, torch.bfloat16)
    run = OF_SUMS[backend]
    results = []
    for h_scale in (1.0, 2.0**-7):
        x_out, y = poisoned(size, torch.float32, device), poisoned(size, torch.float16, device)
        given = post_weight, gate, next_weight, scale, EPS, h_scale, x_out, y, None
        run(x, sums, *given, row_scales * h_scale, column_scales)
        results.append(torch.cat((x_out, y.float())))
    assert torch.equal(*results)
    given = x, sums, post_weight, gate, next_weight, scale, EPS, False, 1.0, row_scales, column_scales
    assert norm.residual_rms_modulate(*given, torch.float16)[1].dtype == torch.float16
    assert norm.residual_rms_modulate(*given)[1].dtype == torch.bfloat16


splits = pytest.mark.parametrize(
    "split",
    [(1, 4, 1), (2, 4, 3), (3, 8, 3), (5, 1, 2), (8, 4, 4)],
    ids=lambda split: "rows{}-warps{}-stages{}".format(*split),
)
images = on_devices(cpu=[(3, 1, 64), (2, 5, 100), (1, 8, 64), (3, 7, 72)], cuda=[(2, 4160, 3840), (3, 33, 3840)])


@images
@splits
@pytest.mark.parametrize("quantise", [False, True], ids=["fp32", "fp8"])
def test_rows_of_a_program_belong_to_one_image(device, size, split, quantise):
    """However many rows a program takes, each gets its own image's gate and scale, and each is written once."""
    x, h, post_weight, next_weight, scale, gate = arguments(size, device, torch.float32)

    def poisoned_rows():
        if quantise:
            return poisoned(size, FP8, device), poisoned((size[0] * size[1], 1), torch.float32, device)
        return poisoned(size, torch.float32, device), None

    def same(ours, x):
        reference = norm.rms_modulate(x, next_weight, scale, EPS, quantise, backend="torch")
        if quantise:
            accuracy.same_fp8(ours, reference)
        else:
            assert error(ours[0], reference) < 1e-6

    rows = poisoned_rows()
    norm_triton.rms_modulate(x, next_weight, scale, EPS, *rows, split)
    same(rows, x)
    if not quantise:
        norm_triton.layer_modulate(x, scale, EPS, rows[0], split)
        assert error(rows[0], norm.layer_modulate(x, scale, EPS, backend="torch")) < 1e-6
    sums, rows = x.clone(), poisoned_rows()
    norm_triton.residual_rms_modulate(
        sums, h, post_weight, gate, next_weight, scale, EPS, 1.0, sums, *rows, split=split
    )
    alone = norm.residual_rms_modulate(x, h, post_weight, gate, None, None, EPS, backend="torch")
    assert error(sums, alone) < 1e-6
    same(rows, sums)
    row_scales = 1 + torch.rand(size[0] * size[1], 1, device=device)
    unscaled = h / row_scales.view(*size[:2], 1)
    again, rows = x.clone(), poisoned_rows()
    scales = row_scales, torch.ones(size[2], device=device)
    given = post_weight, gate, next_weight, scale, EPS, 1.0, again, *rows, *scales
    norm_triton.residual_rms_modulate(again, unscaled, *given, split=split)
    assert error(again, alone) < 1e-6
    same(rows, again)


@pytest.mark.parametrize(
    ("tokens", "width", "split"),
    [
        (1, 3840, (1, 8, 3)),
        (264, 3840, (1, 8, 3)),
        (265, 3840, (2, 8, 3)),
        (4160, 3840, (16, 8, 3)),
        (8, 10240, (1, 16, 1)),
    ],
)
def test_few_rows_have_a_program_each(tokens, width, split):
    assert norm_triton.row_split(tokens, width) == split


@sizes
@dtypes
@pytest.mark.parametrize("stream", [torch.float32, None], ids=["fp32-stream", "same"])
def test_add_rms(device, size, dtype, stream):
    """The sum of a residual stream in fp32 or h's own dtype, and the next norm in h's."""
    x, h, weight, *_ = arguments(size, device, dtype)
    x = x.to(stream or dtype)
    exact_sum = x.double() + h.double()
    exact = eager(exact_sum, weight.double(), None)
    rounded = eager((x + h).to(dtype), weight, None)
    x_out = poisoned(size, torch.float32 if device == "cpu" else x.dtype, device)
    y = poisoned(size, storable(dtype, device), device)
    norm_triton.add_rms(x, h, weight, EPS, x_out, y)
    for ours in ((x_out, y), norm.add_rms(x, h, weight, EPS, backend="torch")):
        within_twice(ours[0], x + h, exact_sum)
        within_twice(ours[1], rounded, exact)


@sizes
def test_add_rms_in_place(device, size):
    x, h, weight, *_ = arguments(size, device, torch.float32)
    held, y = x.clone(), poisoned(size, torch.float32, device)
    norm_triton.add_rms(held, h, weight, EPS, held, y)
    within_twice(held, x + h, x.double() + h.double())
    within_twice(y, eager(x + h, weight, None), eager(x.double() + h.double(), weight.double(), None))


@sizes
def test_nan_stays_visible_in_fp8(device, size):
    """On the CPU by the reference: the interpreter's conversion to FP8 knows no NaN."""
    x, _, weight, _, scale, _ = arguments(size, device, torch.float32)
    x[0, 1, 2] = float("nan")
    codes, row_scales = norm.rms_modulate(x, weight, scale, EPS, quantise=True)
    values = accuracy.dequantised(codes, row_scales)
    assert torch.isnan(values[0, 1]).any() and torch.isfinite(values[0, 0]).all()


def test_outputs_are_written_where_asked():
    x, h, post_weight, next_weight, scale, gate = arguments((2, 3, 64), "cpu", torch.float32)
    out = poisoned(x.shape, torch.float32, "cpu")
    assert norm.rms_modulate(x, post_weight, scale, EPS, out=out) is out and torch.isfinite(out).all()
    before = x.clone()
    x_out, y = norm.residual_rms_modulate(x, h, post_weight, gate, next_weight, scale, EPS, x_out=x, out=out)
    assert x_out is x and y is out and not torch.equal(x, before)
    assert norm.add_rms(x, h, next_weight, EPS, x_out=x, out=out) == (x, out)
    pair = (poisoned(x.shape, FP8, "cpu"), poisoned((6, 1), torch.float32, "cpu"))
    returned = norm.rms_modulate(x, post_weight, scale, EPS, quantise=True, out=pair)
    assert returned[0] is pair[0] and returned[1] is pair[1] and torch.isfinite(pair[1]).all()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(3, 64)}, r"x: expected a contiguous \[B, S, D\] .* got \[3, 64\]"),
        ({"x": torch.zeros(2, 64, 3).transpose(1, 2)}, r"x: expected a contiguous .* pass x.contiguous\(\)"),
        ({"x": torch.zeros(2, 3, 64, dtype=torch.int32)}, "got .* of int32"),
        ({"weight": torch.ones(65)}, r"weight: expected a contiguous \[64\]"),
        ({"scale": torch.zeros(1, 64)}, r"scale: expected \[2, 64\]"),
        ({"scale": torch.zeros(64, 2).T}, "unit stride"),
        ({"dtype": torch.int8}, "dtype: expected one of bfloat16/float16/float32, got torch.int8"),
        ({"out": torch.zeros(2, 3, 63)}, r"out: expected a contiguous \[2, 3, 64\]"),
        ({"quantise": True, "out": torch.zeros(2, 3, 64)}, "out: expected a pair"),
        ({"backend": "triton"}, "triton: needs an NVIDIA GPU, the tensors are on cpu"),
    ],
)
def test_refusals_name_what_was_given(change, complaint):
    given = {"x": torch.zeros(2, 3, 64), "weight": torch.ones(64), "scale": torch.zeros(2, 64), "eps": EPS}
    with pytest.raises(ValueError, match=complaint):
        norm.rms_modulate(**{**given, **change})


def test_a_factor_that_would_round_is_refused():
    x, h, post_weight, _, _, gate = arguments((2, 3, 64), "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"h_scale: expected a power of two.* got 0.1"):
        norm.residual_rms_modulate(x, h, post_weight, gate, None, None, EPS, h_scale=0.1)
    with pytest.raises(ValueError, match="expected none of them without next_weight"):
        norm.residual_rms_modulate(x, h, post_weight, gate, None, None, EPS, quantise=True)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"h_row_scales": None}, "h_row_scales, h_column_scales: expected both or neither"),
        ({"h_column_scales": None}, "h_row_scales, h_column_scales: expected both or neither"),
        ({"h_row_scales": torch.ones(6)}, r"h_row_scales: expected a contiguous \[6, 1\] of float32"),
        ({"h_row_scales": torch.ones(6, 1).half()}, "h_row_scales: .* got .* of float16"),
        ({"h_column_scales": torch.ones(63)}, r"h_column_scales: expected a contiguous \[64\] of float32"),
    ],
)
def test_scales_of_sums_that_do_not_fit_are_refused(change, complaint):
    x, h, post_weight, _, _, gate = arguments((2, 3, 64), "cpu", torch.float32)
    scales = {"h_row_scales": torch.ones(6, 1), "h_column_scales": torch.ones(64)}
    with pytest.raises(ValueError, match=complaint):
        norm.residual_rms_modulate(x, h, post_weight, gate, None, None, EPS, **{**scales, **change})


def test_a_backend_of_sums_is_another_than_that_of_whole_values(monkeypatch):
    """Whoever replaced the op before it knew of sums is not given them, and is given all else."""
    x, h, post_weight, _, _, gate = arguments((2, 3, 64), "cpu", torch.float32)
    for op, taken in ((norm.RESIDUAL_RMS_MODULATE, 11), (norm.RESIDUAL_RMS_MODULATE_OF_SUMS, 13)):
        monkeypatch.setattr(op, "backends", {})
        op.register("mine", lambda *given, taken=taken: given[8].fill_(len(given) - taken), lambda request: None)
    scales = {"h_row_scales": torch.ones(6, 1), "h_column_scales": torch.ones(64)}
    for more in ({}, scales):
        assert not norm.residual_rms_modulate(x, h, post_weight, gate, None, None, EPS, **more).any()
