"""The GPTQ solver against the method written out plainly, and at the edges of what a Hessian may be."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from torch import Tensor

from quantize.grids import SUPPORTED_BITS, Grid, QuantizedTensor, group_index, quantize_nearest
from quantize.solvers import SOLVERS, LayerProblem, SolverOptions
from quantize.solvers.gptq import damping, feed_back, inverse_factor, plan_columns, solve
from quantize.statistics import Statistics

ROWS, COLUMNS = 48, 128
DAMP = 0.01
SEARCH = (20, 0.5)


def correlated_hessian(columns: int = COLUMNS, samples: int = 1024, seed: int = 0) -> Tensor:
    """``2/n * sum(x x^T)`` of inputs that share a few strong directions, as real activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=generator)
    inputs = torch.randn(samples, columns // 4, generator=generator) @ mixing
    inputs += torch.randn(samples, columns, generator=generator)
    inputs *= torch.rand(columns, generator=generator) * 3 + 0.1
    return inputs.t() @ inputs * (2 / samples)


def random_weight(rows: int = ROWS, columns: int = COLUMNS, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def damped(hessian: Tensor) -> Tensor:
    """The Hessian with the solver's damping, in float64."""
    result = hessian.double()
    return result + DAMP * result.diagonal().mean() * torch.eye(len(result), dtype=torch.float64)


def layer_loss(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """``trace((W - Q) H (W - Q)^T)`` in float64."""
    difference = (weight - quantized).double()
    return float(torch.einsum("ij,jk,ik->", difference, hessian.double(), difference))


def problem(
    weights: list[Tensor], hessian: Tensor | None, grid: Grid, desc_act: bool = False, block_size: int = 128
) -> LayerProblem:
    options = SolverOptions(
        desc_act=desc_act, damp_percent=DAMP, block_size=block_size, search_steps=SEARCH[0], search_range=SEARCH[1]
    )
    return LayerProblem([f"layer{i}" for i in range(len(weights))], weights, grid, hessian, options)


def agreement(left: Tensor, right: Tensor) -> float:
    return float((left == right).double().mean())


def textbook(weight: Tensor, hessian: Tensor, grid: Grid, search: tuple[int, float]) -> Tensor:
    """Optimal brain quantization in fixed order: the whole inverse, updated after each column, in float64. The codes."""
    remaining, inverse = weight.double(), torch.linalg.inv(damped(hessian))
    size = grid.columns_per_group(weight.shape[1])
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for j in range(weight.shape[1]):
        if j % size == 0:
            scale, zero = grid.find_params(remaining[:, j : j + size].float(), hessian.diagonal()[j : j + size], *search)
        code = grid.encode(remaining[:, j], scale.double(), zero.double())
        codes[:, j] = code.to(torch.uint8)
        error = (remaining[:, j] - (code - zero) * scale) / inverse[j, j]
        remaining[:, j + 1 :] -= torch.outer(error, inverse[j, j + 1 :])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_codes_are_the_textbook_methods(bits: int, group_size: int, symmetric: bool) -> None:
    grid = Grid(bits, group_size, symmetric)
    weight, hessian = random_weight(), correlated_hessian()
    (found,) = solve(problem([weight], hessian, grid))
    assert agreement(found.codes, textbook(weight, hessian, grid, SEARCH)) >= 0.995


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_returned_loss_is_the_layers_loss(bits: int, group_size: int) -> None:
    grid = Grid(bits, group_size)
    weight, hessian = random_weight(), correlated_hessian()
    factor = inverse_factor(hessian, DAMP, ["layer"])
    options = SolverOptions(desc_act=False, search_steps=0)
    plan = plan_columns(hessian.diagonal(), grid, options)
    codes, scales, zeros, loss = feed_back(weight, factor, hessian.diagonal(), grid, plan, options)
    tensor = QuantizedTensor(codes, scales, zeros.to(torch.uint8), group_index(COLUMNS, group_size), grid)
    assert float(loss.sum()) == pytest.approx(layer_loss(weight, tensor.dequantize(), damped(hessian)), rel=1e-3)


@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_loss_is_far_below_round_to_nearest(bits: int, symmetric: bool, desc_act: bool) -> None:
    grid = Grid(bits, 32, symmetric)
    weight, hessian = random_weight(), correlated_hessian()
    (gptq,) = solve(problem([weight], hessian, grid, desc_act))
    nearest = quantize_nearest(weight, grid)
    ours, theirs = (layer_loss(weight, tensor.dequantize(), hessian) for tensor in (gptq, nearest))
    assert ours < 0.6 * theirs


@pytest.mark.parametrize("group_size", [-1, 16, 32])
@pytest.mark.parametrize("block_size", [1, 16, 24, 64, 1000])
def test_block_size_changes_no_more_than_rare_ties(block_size: int, group_size: int) -> None:
    weight, hessian = random_weight(), correlated_hessian()
    found, expected = (
        solve(problem([weight], hessian, Grid(4, group_size), block_size=size))[0] for size in (block_size, COLUMNS)
    )
    assert agreement(found.codes, expected.codes) >= 0.999
    assert torch.allclose(found.scales.float(), expected.scales.float(), rtol=1e-3)


@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 48])
def test_uncorrelated_inputs_give_round_to_nearest(group_size: int, symmetric: bool, desc_act: bool) -> None:
    grid = Grid(3, group_size, symmetric)
    weight = random_weight()
    (found,) = solve(problem([weight], torch.eye(COLUMNS), grid, desc_act))
    expected = quantize_nearest(weight, grid, *SEARCH)
    for part in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(found, part), getattr(expected, part)), part


@pytest.mark.parametrize("desc_act", [True, False])
def test_weights_of_dead_inputs_become_zero(desc_act: bool) -> None:
    hessian = correlated_hessian()
    dead = torch.zeros(COLUMNS, dtype=torch.bool)
    dead[[0, 7, 50, 127]] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    weight = random_weight()
    for symmetric in (True, False):
        (found,) = solve(problem([weight], hessian, Grid(4, 32, symmetric), desc_act))
        values = found.dequantize()
        assert bool((values[:, dead] == 0).all())
        assert float((values - weight)[:, ~dead].abs().max()) < float(weight.abs().max())


def test_hessian_of_dead_inputs_alone_gives_zeros() -> None:
    (found,) = solve(problem([random_weight()], torch.zeros(COLUMNS, COLUMNS), Grid(4, 32)))
    assert bool((found.dequantize() == 0).all())


@pytest.mark.parametrize("desc_act", [True, False])
def test_fewer_samples_than_columns(desc_act: bool) -> None:
    hessian = correlated_hessian(samples=10)
    assert int(torch.linalg.matrix_rank(hessian)) == 10
    weight = random_weight()
    (found,) = solve(problem([weight], hessian, Grid(4, 32), desc_act))
    nearest = quantize_nearest(weight, found.grid)
    ours, theirs = (layer_loss(weight, tensor.dequantize(), hessian) for tensor in (found, nearest))
    assert ours < 0.1 * theirs


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (3, 100), (127, 126)])
def test_hessian_that_is_not_finite_is_refused(place: tuple[int, int], bad: float) -> None:
    hessian = correlated_hessian()
    hessian[place] = hessian[place[::-1]] = bad
    with pytest.raises(ValueError, match="the Hessian of layer0 holds NaN or infinity"):
        solve(problem([random_weight()], hessian, Grid(4, 32)))


def test_damping_is_raised_for_an_indefinite_hessian(caplog: pytest.LogCaptureFixture) -> None:
    hessian = torch.eye(8)
    hessian[2, 5] = hessian[5, 2] = 1.05  # an eigenvalue of -0.05: 1 % of damping does not mend it, 10 % does
    with caplog.at_level(logging.WARNING, logger="quantize.solvers.gptq"):
        factor = inverse_factor(hessian, DAMP, ["model.layers.3.mlp.up_proj", "model.layers.3.mlp.gate_proj"])
    assert [record.getMessage() for record in caplog.records] == [
        "model.layers.3.mlp.up_proj, model.layers.3.mlp.gate_proj: Hessian is not positive definite; damp_percent raised to 0.1"
    ]
    assert torch.allclose(factor.t() @ factor, torch.linalg.inv(hessian + 0.1 * torch.eye(8)), rtol=1e-4, atol=1e-5)


def test_hessian_beyond_all_damping_is_refused() -> None:
    with pytest.raises(ValueError, match="the Hessian of a, b is not positive semi-definite"):
        inverse_factor(torch.diag(torch.tensor([1.0, 1.0, -5.0])), DAMP, ["a", "b"])


def test_inverse_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    hessian = correlated_hessian()
    factor = inverse_factor(hessian, DAMP, ["layer"])
    assert torch.equal(factor, factor.triu())
    assert bool((factor.diagonal() > 0).all())
    expected = torch.linalg.inv(damped(hessian))
    assert torch.allclose(factor.double().t() @ factor.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    exact = torch.linalg.cholesky(expected, upper=True)
    assert torch.allclose(factor.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("group_size", [16, 32])
def test_activation_order_groups_columns_of_like_importance(group_size: int) -> None:
    hessian = correlated_hessian()
    (found,) = solve(problem([random_weight()], hessian, Grid(4, group_size), desc_act=True))
    assert found.g_idx.dtype == torch.int32
    assert torch.bincount(found.g_idx).tolist() == [group_size] * (COLUMNS // group_size)
    assert not torch.equal(found.g_idx, group_index(COLUMNS, group_size))
    members = [hessian.diagonal()[found.g_idx == group] for group in range(COLUMNS // group_size)]
    for earlier, later in itertools.pairwise(members):
        assert float(earlier.min()) >= float(later.max())


def test_activation_order_is_natural_order_on_sorted_columns() -> None:
    """Sorting the columns oneself and solving in natural order is the same as ``desc_act``."""
    weight, hessian = random_weight(), correlated_hessian()
    order = hessian.diagonal().argsort(descending=True, stable=True)
    (found,) = solve(problem([weight], hessian, Grid(4, 32), desc_act=True))
    (by_hand,) = solve(problem([weight[:, order]], hessian[order][:, order], Grid(4, 32), desc_act=False))
    assert torch.equal(found.dequantize()[:, order], by_hand.dequantize())


@pytest.mark.parametrize("desc_act", [True, False])
def test_layers_solved_together_are_solved_as_if_alone(desc_act: bool) -> None:
    weights = [random_weight(rows, seed=rows) for rows in (16, 40, 1)]
    hessian, grid = correlated_hessian(), Grid(4, 32, symmetric=False)
    together = solve(problem(weights, hessian, grid, desc_act))
    assert len(together) == len(weights)
    for weight, found in zip(weights, together, strict=True):
        (alone,) = solve(problem([weight], hessian, grid, desc_act))
        assert found.codes.shape == weight.shape
        assert found.scales.shape == found.zeros.shape == (len(weight), 4)
        assert torch.equal(found.g_idx, alone.g_idx)
        assert agreement(found.codes, alone.codes) >= 0.999
        assert torch.allclose(found.dequantize(), alone.dequantize(), atol=float(alone.scales.max()) * 1.01)


def test_inputs_are_left_alone() -> None:
    weight, hessian = random_weight(), correlated_hessian()
    hessian[5] = hessian[:, 5] = 0
    kept = weight.clone(), hessian.clone()
    solve(problem([weight], hessian, Grid(4, 32), desc_act=True))
    assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1])


def test_more_effort_lowers_the_loss() -> None:
    weight, hessian = random_weight(), correlated_hessian()
    losses = []
    for steps in (0, 40):
        options = SolverOptions(damp_percent=DAMP, search_steps=steps)
        (found,) = solve(LayerProblem(["layer"], [weight], Grid(3, 32), hessian, options))
        losses.append(layer_loss(weight, found.dequantize(), hessian))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_hessian_is_required() -> None:
    with pytest.raises(ValueError, match="GPTQ needs the Hessian of layer0, layer1"):
        solve(problem([random_weight(), random_weight()], None, Grid(4, 32)))


def test_registered_as_calibrated_solver() -> None:
    assert SOLVERS["gptq"].solve is solve
    assert SOLVERS["gptq"].quantizes and SOLVERS["gptq"].needs_calibration


def test_group_aware_order_keeps_groups_consecutive_and_takes_the_important_first() -> None:
    importance = torch.tensor([1.0, 4, 2, 2, 9, 1, 3, 3, 50, 60])  # groups of four: means 2.25 and 4; the last one is ragged
    plan = plan_columns(importance, Grid(4, 4), SolverOptions(desc_act=False, act_group_aware=True))
    assert plan.order.tolist() == [4, 6, 7, 5, 1, 2, 3, 0, 9, 8]
    assert plan.groups.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 2, 2]
    assert not plan.static


@pytest.mark.parametrize("block_size", [1, 8, 16, 128])
@pytest.mark.parametrize("columns", [128, 100])
def test_group_aware_order_does_not_depend_on_the_block_size(columns: int, block_size: int) -> None:
    weight, hessian = random_weight(columns=columns), correlated_hessian(columns)
    found, expected = (
        solve(
            LayerProblem(
                ["layer"],
                [weight],
                Grid(4, 16),
                hessian,
                SolverOptions(desc_act=False, act_group_aware=True, block_size=size),
            )
        )[0]
        for size in (block_size, columns)
    )
    assert agreement(found.codes, expected.codes) >= 0.999
    assert found.g_idx.tolist() == group_index(columns, 16).tolist()


@pytest.mark.parametrize("desc_act", [True, False])
def test_static_groups_take_their_scales_from_the_weights_as_they_are(desc_act: bool) -> None:
    weight, hessian, grid = random_weight(), correlated_hessian(), Grid(4, 32, symmetric=False)
    options = SolverOptions(desc_act=desc_act, static_groups=True, search_steps=0)
    (found,) = solve(LayerProblem(["layer"], [weight], grid, hessian, options))
    nearest = quantize_nearest(weight, grid)
    assert torch.equal(found.scales, nearest.scales) and torch.equal(found.zeros, nearest.zeros)
    assert torch.equal(found.g_idx, nearest.g_idx)
    assert layer_loss(weight, found.dequantize(), hessian) < 0.6 * layer_loss(weight, nearest.dequantize(), hessian)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_drift_is_made_good_as_least_squares_would(alpha: float) -> None:
    """With 8 bits rounding is nearly free, so the result is the least-squares target itself."""
    generator = torch.Generator().manual_seed(3)
    clean = torch.randn(4096, COLUMNS, generator=generator)
    damaged = clean + 0.8 * torch.randn(4096, COLUMNS, generator=generator) @ torch.diag(torch.linspace(0, 1, COLUMNS))
    weight = random_weight()
    statistics = Statistics()
    statistics.add(damaged, clean)
    hessian, drift = statistics.hessian(), statistics.drift()
    options = SolverOptions(damp_percent=1e-6, gptaq_alpha=alpha)
    (found,) = solve(LayerProblem(["layer"], [weight], Grid(8, 32), hessian, options, drift))
    wanted = (alpha * clean + (1 - alpha) * damaged) @ weight.t()
    target = torch.linalg.lstsq(damaged.double(), wanted.double()).solution.t()
    assert float((found.dequantize() - target).abs().max()) < 2 * float(found.scales.max())
    assert float((target - weight).abs().max()) > 10 * float(found.scales.max())
    (plain,) = solve(LayerProblem(["layer"], [weight], Grid(8, 32), hessian, SolverOptions(damp_percent=1e-6), drift))
    errors = [float((damaged @ tensor.dequantize().t() - wanted).square().mean()) for tensor in (found, plain)]
    assert errors[0] < errors[1]


def test_few_tokens_raise_the_damping() -> None:
    options = SolverOptions(damp_percent=0.01)
    assert damping(options, 128, None) == damping(options, 128, 128) == damping(options, 128, 5000) == 0.01
    assert damping(options, 128, 32) == pytest.approx(0.04)
    assert damping(options, 128, 1) == 1.0
    # Three tokens say little: the result stays closer to plain rounding than their Hessian alone would have it.
    hessian, weight = correlated_hessian(samples=3), random_weight()
    few, many = (
        solve(LayerProblem(["expert"], [weight], Grid(4, 32), hessian, SolverOptions(), tokens=tokens))[0]
        for tokens in (3, 5000)
    )
    distance = [float((tensor.dequantize() - weight).norm()) for tensor in (few, many)]
    assert distance[0] < distance[1]
