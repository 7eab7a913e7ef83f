"""AWQ: the search finds scales that lower the output error and never raise it, and its quadratic forms are that error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantize.grids import Grid, grouped, quantize_nearest
from quantize.solvers import SOLVERS, LayerProblem, ScaleProblem, SolverOptions
from quantize.solvers import awq as solver
from quantize.solvers.awq import (
    candidate_scales,
    clipped_params,
    find_scales,
    hessian_blocks,
    layer_loss,
    module_loss,
    relative_magnitudes,
    scaled_round_trip,
    search_scales,
    solve,
)
from quantize.statistics import Statistics

GRID = Grid(4, 16, symmetric=False, zero_min=0)
PLAIN = Grid(4, -1, symmetric=True)


def salient_inputs(rows: int = 96, columns: int = 48, seed: int = 0) -> Tensor:
    """Correlated inputs of which two channels are large."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) + 0.5 * torch.randn(rows, 1, generator=generator)
    values[:, (3, 17)] *= 12
    return values


def some_weights(seed: int = 1, columns: int = 48) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, columns, generator=generator), torch.randn(8, columns, generator=generator)]


def statistics_of(inputs: Tensor) -> Statistics:
    statistics = Statistics(means=True)
    for part in torch.split(inputs, 40):
        statistics.add(part)
    return statistics


def output_error(inputs: Tensor, weight: Tensor, other: Tensor, rows_at_once: int = 7) -> float:
    """Mean squared error of a layer's outputs, from activations in slices of tokens, on the scale of the Hessian."""
    slices = torch.split(inputs.double(), rows_at_once)
    return 2 / len(inputs) * sum(float((part @ (other - weight).double().t()).square().sum()) for part in slices)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([-1, 16, 20]), st.booleans())
def test_the_loss_without_activations_is_that_of_the_activations(seed: int, group_size: int, symmetric: bool) -> None:
    inputs, weights = salient_inputs(seed=seed), some_weights(seed)
    grids = [Grid(4, group_size, symmetric, 0), Grid(3, 16, symmetric, 0)]
    scales = torch.rand(5, 48, generator=torch.Generator().manual_seed(seed)) + 0.5
    found = layer_loss(weights, grids, statistics_of(inputs).hessian())(scales)
    for index, own in enumerate(scales):
        rounded = [quantize_nearest(w * own, grid).dequantize() / own for w, grid in zip(weights, grids, strict=True)]
        expected = sum(output_error(inputs, w, r) for w, r in zip(weights, rounded, strict=True))
        assert float(found[index]) == pytest.approx(expected, rel=1e-4)


def test_slices_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weights = salient_inputs(), some_weights()
    hessian, scales = statistics_of(inputs).hessian(), torch.rand(5, 48) + 0.5
    problem = LayerProblem(["layer"], weights, GRID, hessian, SolverOptions(search_steps=10))
    whole = layer_loss(weights, [GRID, GRID], hessian)(scales), relative_magnitudes(weights, [GRID, GRID]), solve(problem)
    monkeypatch.setattr(solver, "_SLICE", 100)
    sliced = layer_loss(weights, [GRID, GRID], hessian)(scales), relative_magnitudes(weights, [GRID, GRID]), solve(problem)
    torch.testing.assert_close(sliced[0], whole[0])
    torch.testing.assert_close(sliced[1], whole[1])
    for ours, expected in zip(sliced[2], whole[2], strict=True):
        assert torch.equal(ours.codes, expected.codes) and torch.equal(ours.scales, expected.scales)


def test_candidates_are_the_paper_s_with_a_middle_of_1() -> None:
    means, magnitudes = torch.rand(48) * 5 + 0.1, torch.rand(48) * 0.9 + 0.1
    scales = candidate_scales(means, magnitudes, [0.0, 0.35, 1.0])
    for own, alpha in zip(scales, (0.0, 0.35, 1.0), strict=True):
        expected = means**alpha / (magnitudes ** (1 - alpha) + 1e-4)
        torch.testing.assert_close(own / own[0], expected / expected[0])
        assert float(own.max() * own.min()) == pytest.approx(1, rel=1e-4)


def test_channels_that_are_always_zero_do_no_harm() -> None:
    inputs = salient_inputs()
    inputs[:, 5] = 0
    statistics = statistics_of(inputs)
    problem = ScaleProblem(some_weights(), [GRID, GRID], statistics.hessian(), statistics.means(), SolverOptions())
    scales, alpha = find_scales(problem)
    assert alpha is not None
    assert bool(torch.isfinite(scales).all()) and bool((scales > 0).all())


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 20))
def test_refining_never_raises_the_loss_nor_does_scaling(seed: int, steps: int) -> None:
    inputs, weights = salient_inputs(seed=seed), some_weights(seed)
    statistics, grids = statistics_of(inputs), [GRID, GRID]
    loss = layer_loss(weights, grids, statistics.hessian())
    means, magnitudes = statistics.means(), relative_magnitudes(weights, grids)
    _, _, coarse = search_scales(means, magnitudes, loss, steps=steps, refinements=0)
    scales, alpha, fine = search_scales(means, magnitudes, loss, steps=steps)
    assert fine <= coarse
    assert fine <= float(loss(torch.ones(1, 48)))
    assert fine == pytest.approx(float(loss(scales[None])), rel=1e-5)
    assert (alpha is None) == torch.equal(scales, torch.ones(48))


def test_scaling_pays_where_inputs_are_salient() -> None:
    inputs, weights = salient_inputs(), some_weights()
    statistics = statistics_of(inputs)
    loss = layer_loss(weights, [GRID, GRID], statistics.hessian())
    problem = ScaleProblem(weights, [GRID, GRID], statistics.hessian(), statistics.means(), SolverOptions())
    scales, alpha = find_scales(problem)
    assert alpha is not None and float(scales[3]) > 1.5 * float(scales.median())
    assert float(loss(scales[None])) < 0.7 * float(loss(torch.ones(1, 48)))


def test_scales_that_do_not_fit_are_left_out() -> None:
    def refuse(_: Tensor) -> Tensor:
        raise ValueError("too large")

    statistics = statistics_of(salient_inputs())
    problem = ScaleProblem(some_weights(), [GRID, GRID], statistics.hessian(), statistics.means(), SolverOptions(), refuse)
    scales, alpha = find_scales(problem)
    assert alpha is None and torch.equal(scales, torch.ones(48))


def test_a_module_s_loss_is_asked_for_all_candidates_together(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weights, asked = salient_inputs(), some_weights(), []

    def outputs(candidates: list[Tensor]) -> Tensor:
        asked.append(len(candidates[0]))
        stacked = torch.cat(candidates, 1) - torch.cat(weights)
        return (inputs @ stacked.transpose(1, 2)).square().sum((1, 2)) * 2 / len(inputs)

    grids, scales = [GRID, GRID], torch.rand(5, 48) + 0.5
    expected = layer_loss(weights, grids, statistics_of(inputs).hessian())(scales)
    torch.testing.assert_close(module_loss(weights, grids, outputs)(scales), expected, rtol=1e-4, atol=1e-4)
    assert asked == [5]
    monkeypatch.setattr(solver, "_SLICE", 2 * 48 * 48 // 16)
    torch.testing.assert_close(module_loss(weights, grids, outputs)(scales), expected, rtol=1e-4, atol=1e-4)
    assert asked[1:] == [2, 2, 1]


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([-1, 16, 20]), st.booleans(), st.integers(1, 20))
def test_clipping_never_raises_a_group_s_error(seed: int, group_size: int, symmetric: bool, steps: int) -> None:
    grid = Grid(4, group_size, symmetric, 0)
    inputs, (weight, _) = salient_inputs(seed=seed), some_weights(seed)
    blocks = hessian_blocks(statistics_of(inputs).hessian(), grid)
    groups = grouped(weight, grid).transpose(0, 1)

    def errors(search: int) -> Tensor:
        scale, zero = clipped_params(groups, blocks, grid, search)
        assert torch.equal(scale, grid.round_scale(scale)) and bool((zero >= 0).all()) and bool((zero <= grid.maxq).all())
        error = grid.round_trip(groups, scale[..., None], zero[..., None]) - groups
        return (torch.bmm(error, blocks) * error).sum(-1)

    assert bool((errors(steps) <= errors(0) * (1 + 1e-6)).all())


def test_a_group_s_error_is_that_of_its_share_of_the_output() -> None:
    inputs, weight = salient_inputs(), some_weights()[0]
    blocks = hessian_blocks(statistics_of(inputs).hessian(), GRID)
    error = grouped(quantize_nearest(weight, GRID).dequantize() - weight, GRID).transpose(0, 1)
    found = (torch.bmm(error, blocks) * error).sum(-1)
    for group in range(3):
        share = inputs[:, 16 * group : 16 * group + 16] @ error[group].t()
        torch.testing.assert_close(found[group], share.square().sum(0) * 2 / len(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [GRID, PLAIN, Grid(3, 20, False, 1)])
def test_solving_lowers_the_error_of_rounding_to_nearest(grid: Grid) -> None:
    inputs, weights = salient_inputs(), some_weights()
    problem = LayerProblem(["a", "b"], weights, grid, statistics_of(inputs).hessian(), SolverOptions(search_steps=20))
    for weight, found in zip(weights, solve(problem), strict=True):
        nearest = quantize_nearest(weight, grid).dequantize()
        assert output_error(inputs, weight, found.dequantize()) < output_error(inputs, weight, nearest)
        assert found.codes.dtype == torch.uint8 and found.codes.shape == weight.shape
        assert found.scales.shape == found.zeros.shape == (len(weight), grid.num_groups(48))
        assert int(found.zeros.min()) >= grid.zero_min


def test_without_a_search_solving_is_rounding_to_nearest() -> None:
    weights = some_weights()
    hessian = statistics_of(salient_inputs()).hessian()
    found = solve(LayerProblem(["a", "b"], weights, GRID, hessian, SolverOptions(search_steps=0)))
    for weight, tensor in zip(weights, found, strict=True):
        nearest = quantize_nearest(weight, GRID)
        for part in ("codes", "scales", "zeros", "g_idx"):
            assert torch.equal(getattr(tensor, part), getattr(nearest, part)), part


def test_the_scaled_round_trip_is_the_layer_with_scales_folded() -> None:
    weight, scales = some_weights()[0], torch.rand(3, 48) + 0.5
    found = scaled_round_trip(weight, scales, GRID)
    for index, own in enumerate(scales):
        torch.testing.assert_close(found[index], quantize_nearest(weight * own, GRID).dequantize() / own)


def test_without_statistics_there_is_an_error_that_names_the_layer() -> None:
    with pytest.raises(ValueError, match="Hessian of some_layer"):
        solve(LayerProblem(["some_layer"], [torch.ones(4, 16)], GRID, None, SolverOptions()))


def test_awq_and_gptq_go_together() -> None:
    both = SOLVERS["awq+gptq"]
    assert both.find_scales is SOLVERS["awq"].find_scales and both.solve is SOLVERS["gptq"].solve
    assert both.makes_good and not SOLVERS["awq"].makes_good


def test_means_are_of_magnitudes() -> None:
    inputs = salient_inputs()
    statistics = Statistics(means=True, windows=2)
    for part in torch.split(inputs, 32):
        statistics.add(part[None])
    torch.testing.assert_close(statistics.means(), inputs.abs().mean(0))
    assert [tuple(window.shape) for window in statistics.windows] == [(1, 32, 48)] * 2
    torch.testing.assert_close(statistics.windows[1][0], inputs[32:64])
    with pytest.raises(ValueError, match="no inputs"):
        Statistics().means()


def test_linear_layers_are_what_the_quadratic_form_says() -> None:
    """The Hessian of a layer with a bias: the bias cancels."""
    layer, inputs = nn.Linear(48, 4), salient_inputs()
    other = quantize_nearest(layer.weight.data, GRID).dequantize()
    moved = nn.functional.linear(inputs, other, layer.bias) - layer(inputs)
    expected = float(moved.square().sum()) * 2 / len(inputs)
    delta = other - layer.weight.data
    assert float((delta @ statistics_of(inputs).hessian() * delta).sum()) == pytest.approx(expected, rel=1e-4)
