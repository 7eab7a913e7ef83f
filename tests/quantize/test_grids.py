"""Grids: which error rounding may make, and that parameters stay where every container can store them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from quantize.errors import InputError
from quantize.grids import SUPPORTED_BITS, Grid, QuantizedTensor, group_index, quantize_nearest

bits = st.sampled_from(SUPPORTED_BITS)
HALF_EPS = torch.finfo(torch.float16).eps / 2


@st.composite
def weights(draw: st.DrawFn, rows: int = 4, columns: int = 32) -> Tensor:
    """Rows of ordinary layer weights: any spread between 1e-3 and 1e2, any shift, here and there an outlier."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(rows, columns, generator=generator) * 10 ** draw(st.floats(-3, 2))
    values += values.std() * draw(st.floats(-4, 4))
    if draw(st.booleans()):
        values[0, draw(st.integers(0, columns - 1))] *= 20
    return values


def expand(params: Tensor, tensor: QuantizedTensor) -> Tensor:
    """A per-group parameter for each weight."""
    return params.float()[:, tensor.g_idx.long()]


@given(weights(), bits, st.booleans(), st.sampled_from([-1, 8, 16]))
def test_error_is_at_most_half_a_step(values: Tensor, bits: int, symmetric: bool, group_size: int) -> None:
    tensor = quantize_nearest(values, Grid(bits, group_size, symmetric))
    scales = expand(tensor.scales, tensor)
    # A scale rounded down by fp16 leaves the ends of the range outside: half an ulp of the scale for each step.
    half_ulp = (scales * HALF_EPS).clamp(min=torch.finfo(torch.float16).smallest_normal * HALF_EPS)
    assert bool(((tensor.dequantize() - values).abs() <= 0.5001 * scales + tensor.grid.maxq * half_ulp).all())


@given(weights(), bits, st.booleans())
def test_error_is_exactly_half_a_step_where_nothing_is_clipped(values: Tensor, bits: int, symmetric: bool) -> None:
    tensor = quantize_nearest(values, Grid(bits, 16, symmetric))
    scales, zeros = expand(tensor.scales, tensor), expand(tensor.zeros, tensor)
    below, above = values < -zeros * scales, values > (tensor.grid.maxq - zeros) * scales
    error = (tensor.dequantize() - values).abs()
    assert bool((error <= 0.5 * scales * (1 + 1e-5))[~below & ~above].all())
    # What is clipped goes to the end of the grid it lies beyond.
    assert bool((tensor.codes[below] == 0).all()) and bool((tensor.codes[above] == tensor.grid.maxq).all())


@given(weights(), bits, st.booleans())
def test_grid_values_are_fixed_points(values: Tensor, bits: int, symmetric: bool) -> None:
    grid = Grid(bits, 16, symmetric)
    tensor = quantize_nearest(values, grid)
    grouped = tensor.dequantize().view(len(values), -1, 16)
    again = grid.round_trip(grouped, tensor.scales.float()[..., None], tensor.zeros.float()[..., None])
    assert torch.equal(again, grouped)


@given(weights(), bits)
def test_quantizing_twice_changes_nothing(values: Tensor, bits: int) -> None:
    # An asymmetric group that uses both ends of its grid has the same range, hence the same grid, the second time.
    once = quantize_nearest(values, Grid(bits, -1, symmetric=False))
    both_ends = (once.codes == 0).any(1) & (once.codes == once.grid.maxq).any(1)
    assume(bool(both_ends.any()))
    twice = quantize_nearest(once.dequantize(), once.grid)
    assert torch.allclose(twice.dequantize()[both_ends], once.dequantize()[both_ends], rtol=2 * HALF_EPS, atol=0)
    assert torch.equal(twice.codes[both_ends], once.codes[both_ends])


@given(weights(), bits, st.booleans(), st.integers(-3, 3))
def test_scaling_by_a_power_of_two_scales_the_result(values: Tensor, bits: int, symmetric: bool, power: int) -> None:
    grid = Grid(bits, 16, symmetric)
    plain, scaled = quantize_nearest(values, grid), quantize_nearest(values * 2.0**power, grid)
    normal = torch.finfo(torch.float16).smallest_normal
    assume(min(float(plain.scales.min()), float(scaled.scales.min())) >= normal)
    assert torch.equal(scaled.codes, plain.codes)
    assert torch.equal(scaled.zeros, plain.zeros)
    assert torch.equal(scaled.dequantize(), plain.dequantize() * 2.0**power)


@given(weights(), bits, st.booleans(), st.integers(0, 20), st.floats(0, 0.99))
def test_codes_and_parameters_stay_in_range(values: Tensor, bits: int, symmetric: bool, steps: int, reach: float) -> None:
    tensor = quantize_nearest(values, Grid(bits, 8, symmetric), steps, reach)
    assert tensor.codes.dtype == tensor.zeros.dtype == torch.uint8
    assert tensor.scales.dtype == torch.float16
    assert int(tensor.codes.max()) <= tensor.grid.maxq
    assert int(tensor.zeros.min()) >= 1 and int(tensor.zeros.max()) <= tensor.grid.maxq
    assert bool((tensor.scales > 0).all())
    if symmetric:
        assert bool((tensor.zeros == 2 ** (bits - 1)).all())


@given(weights(), bits, st.sampled_from([-1.0, 1.0]))
def test_one_sided_groups_use_the_whole_grid(values: Tensor, bits: int, sign: float) -> None:
    """All-positive weights give the lowest zero point a container can store, all-negative the highest."""
    tensor = quantize_nearest(values.abs() * sign, Grid(bits, -1, symmetric=False))
    assert bool((tensor.zeros == (1 if sign > 0 else tensor.grid.maxq)).all())
    farthest = tensor.codes.amax(1) if sign > 0 else tensor.codes.amin(1)
    assert bool((farthest == (tensor.grid.maxq if sign > 0 else 0)).all())


def test_zero_point_zero_is_used_only_where_allowed() -> None:
    values = torch.linspace(0, 1, 32).view(1, -1)
    tensor = quantize_nearest(values, Grid(4, symmetric=False, zero_min=0))
    assert int(tensor.zeros) == 0 and int(tensor.codes.max()) == 15
    assert float(tensor.scales) == pytest.approx(1 / 15, rel=HALF_EPS)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize("constant", [0.0, -0.0, 0.75, -0.75, 1e-30])
def test_constant_rows(bits: int, symmetric: bool, constant: float) -> None:
    tensor = quantize_nearest(torch.full((2, 16), constant), Grid(bits, 8, symmetric))
    found = tensor.dequantize()
    assert bool((tensor.scales > 0).all())
    if abs(constant) < 1e-20:
        assert bool((found == 0).all())
        assert bool((tensor.scales == torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps).all())
    elif symmetric:  # the symmetric range ends half a step short of its positive end
        assert float((found - constant).abs().max()) <= abs(constant) / tensor.grid.maxq * 1.01
    else:
        assert torch.allclose(found, torch.full_like(found, constant), rtol=2 * HALF_EPS)


@given(weights(columns=24), bits, st.booleans(), st.integers(1, 40), st.floats(0, 0.99), st.booleans())
def test_search_never_increases_the_weighted_error(
    values: Tensor, bits: int, symmetric: bool, steps: int, reach: float, weighted: bool
) -> None:
    grid = Grid(bits, -1, symmetric)
    importance = torch.rand(24, generator=torch.Generator().manual_seed(steps)) ** 4 if weighted else None

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        squares = (grid.round_trip(values, scale[:, None], zero[:, None]) - values).square()
        return (squares * (1 if importance is None else importance)).sum(1)

    plain = error(*grid.find_params(values, importance))
    searched = error(*grid.find_params(values, importance, steps, reach))
    assert bool((searched <= plain).all())


def test_search_finds_a_smaller_range_under_an_outlier() -> None:
    values = torch.cat([torch.linspace(-1, 1, 127), torch.tensor([4.0])]).view(1, -1)
    grid = Grid(4)
    plain, searched = (quantize_nearest(values, grid, steps, 0.6) for steps in (0, 40))
    assert float(searched.scales) < float(plain.scales)
    # Importance on the outlier alone leaves the range as it is.
    only_outlier = (values > 2).float()
    assert torch.equal(grid.find_params(values, only_outlier, 40, 0.6)[0], plain.scales.float()[:, 0])


@given(st.integers(1, 40), st.integers(1, 48), bits, st.booleans())
def test_ragged_last_group_is_quantized_alone(columns: int, group_size: int, bits: int, symmetric: bool) -> None:
    values = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
    grid = Grid(bits, group_size, symmetric)
    whole = quantize_nearest(values, grid)
    assert whole.codes.shape == values.shape
    assert whole.scales.shape == whole.zeros.shape == (3, math.ceil(columns / group_size)) == (3, grid.num_groups(columns))
    parts = [quantize_nearest(part, Grid(bits, -1, symmetric)) for part in torch.split(values, group_size, 1)]
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts], 1))


@given(weights())
def test_symmetric_4_bit_is_autogptqs_formula(values: Tensor) -> None:
    scale, zero = Grid(4).find_params(values)
    assert torch.equal(scale, (2 * values.abs().amax(1) / 15).half().float())
    assert bool((zero == 8).all())


@pytest.mark.parametrize(
    ("values", "scale", "zero"),
    [
        ([-1.0, 0.25, 2.0], 3 / 15, 5),
        ([0.5, 1.4], 1.4 / 14, 1),  # one code is spent on the zero point of at least 1
        ([-0.02, 1.4], 1.4 / 14, 1),  # and covers a small negative weight as well
        ([-1.5, -0.5], 1.5 / 15, 15),
    ],
)
def test_asymmetric_formula(values: list[float], scale: float, zero: int) -> None:
    found_scale, found_zero = Grid(4, symmetric=False).find_params(torch.tensor([values]))
    assert float(found_scale) == float(torch.tensor(scale).half())
    assert float(found_zero) == zero


def test_codes_round_half_to_even() -> None:
    codes = Grid(4).encode(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), torch.tensor(1.0), torch.tensor(8.0))
    assert codes.tolist() == [8, 10, 10, 8, 6]


def test_scales_are_rounded_before_weights() -> None:
    """Dequantizing with the stored scales gives exactly what the solver saw."""
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    grid = Grid(4, 16)
    scale, zero = grid.find_params(values.view(8, 4, 16))
    seen = grid.round_trip(values.view(8, 4, 16), scale[..., None], zero[..., None]).view(8, 64)
    assert torch.equal(quantize_nearest(values, grid).dequantize(), seen)
    assert torch.equal(scale.half().float(), scale)


@given(bits, st.booleans(), st.sampled_from([-1, 8]), st.integers(0, 127), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_weights_that_are_no_numbers_are_refused(bits: int, symmetric: bool, group_size: int, place: int, value: float) -> None:
    values = torch.randn(4, 32)
    values.view(-1)[place] = value
    with pytest.raises(InputError, match="damaged" if math.isnan(value) else "out of range"):
        quantize_nearest(values, Grid(bits, group_size, symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [6e5, math.inf])
def test_scale_beyond_the_stored_type_is_refused(symmetric: bool, value: float) -> None:
    with pytest.raises(InputError, match=r"needs scale .*beyond torch\.float16's 6\.55e\+04"):
        quantize_nearest(torch.tensor([[value, -value]]), Grid(2, -1, symmetric))
    if math.isfinite(value):
        wide = quantize_nearest(torch.tensor([[value, -value]]), Grid(2, -1, symmetric, scale_dtype=torch.bfloat16))
        assert float(wide.scales) == pytest.approx(2 * value / 3, rel=0.01)


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 16, -4])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match=rf"solver\.bits={bits} is not supported; use one of 2, 3, 4, 8"):
        Grid(bits)


@pytest.mark.parametrize("group_size", [0, -2, -128])
def test_impossible_group_sizes_are_refused(group_size: int) -> None:
    with pytest.raises(InputError, match=rf"solver\.group_size={group_size} is not a group; use -1"):
        Grid(4, group_size)


@pytest.mark.parametrize(
    ("columns", "advice"), [(192, "use 64, 32, 16 or -1"), (576 + 32, "use 32, 16 or -1"), (100, "use -1")]
)
def test_check_divides_proposes_what_fits(columns: int, advice: str) -> None:
    with pytest.raises(InputError) as caught:
        Grid(4, 128).check_divides("model.layers.0.mlp.down_proj", columns)
    assert str(caught.value) == (
        f"group_size=128 does not divide in_features={columns} of model.layers.0.mlp.down_proj; {advice}"
    )


@pytest.mark.parametrize(("group_size", "columns"), [(-1, 100), (128, 256), (1, 7)])
def test_check_divides_accepts_whole_groups(group_size: int, columns: int) -> None:
    grid = Grid(4, group_size)
    grid.check_divides("layer", columns)
    assert grid.num_groups(columns) * grid.columns_per_group(columns) == columns


def test_group_index() -> None:
    assert group_index(6, 2).tolist() == [0, 0, 1, 1, 2, 2]
    assert group_index(5, 2).tolist() == [0, 0, 1, 1, 2]
    assert group_index(4, -1).tolist() == [0, 0, 0, 0]
    assert group_index(4, 2).dtype == torch.int32


def test_dequantize_follows_the_group_index() -> None:
    tensor = QuantizedTensor(
        codes=torch.tensor([[9, 9, 7, 7]], dtype=torch.uint8),
        scales=torch.tensor([[1.0, 10.0]], dtype=torch.float16),
        zeros=torch.tensor([[8, 6]], dtype=torch.uint8),
        g_idx=torch.tensor([0, 1, 1, 0], dtype=torch.int32),
        grid=Grid(4, 2, symmetric=False),
    )
    assert tensor.dequantize().tolist() == [[1.0, 30.0, 10.0, -1.0]]
    assert tensor.dequantize(torch.float16).dtype == torch.float16


@pytest.mark.parametrize(("bits", "expected"), [(4, 8 * 64 // 2 + 8 * 4 // 2 + 2 * 8 * 4), (3, 8 * 64 * 3 // 8 + 12 + 64)])
def test_nbytes_counts_packed_bits(bits: int, expected: int) -> None:
    assert quantize_nearest(torch.randn(8, 64), Grid(bits, 16)).nbytes() == expected
