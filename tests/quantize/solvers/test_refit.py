"""Fitting scales to codes: a least-squares solution that never makes a row worse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantize.gguf_grids import gguf_grid
from quantize.grids import Grid, QuantizedTensor, group_index
from quantize.solvers.base import LayerProblem, SolverOptions
from quantize.solvers.gptq import solve
from quantize.solvers.refit import Rounding, fit, losses, refine

ROWS, COLUMNS = 24, 256


def hessian_of(seed: int = 0, columns: int = COLUMNS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns) * 0.5
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing * torch.logspace(-1, 1, columns)
    hessian: Tensor = 2 * inputs.t() @ inputs / len(inputs)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return hessian


def weight_of(seed: int = 1) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.05


def nearest(weight: Tensor, grid: Grid, hessian: Tensor) -> tuple[Rounding, Tensor]:
    size = grid.group_size
    groups = group_index(COLUMNS, size).long()
    found = grid.find_params(weight.view(ROWS, -1, size))
    scales, zeros = grid.settle(*found)
    codes = grid.encode(weight, scales[:, groups], zeros[:, groups])
    rounding = Rounding(codes.to(torch.uint8), scales, zeros, torch.empty(0))
    rounding.losses = losses(weight - rounding.weight(groups), hessian)
    return rounding, groups


GRIDS = [Grid(4, 64, False), Grid(3, 32, True), *(gguf_grid(kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K", "Q8_0"))]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fit_is_the_least_squares_solution(grid: Grid) -> None:
    weight, hessian = weight_of(), hessian_of()
    rounding, groups = nearest(weight, grid, hessian)
    scales, zeros = fit(rounding, weight, hessian, groups, grid)
    fitted = Rounding(rounding.codes, scales, zeros, rounding.losses)
    found = losses(weight - fitted.weight(groups), hessian)
    if grid.bits < 6:  # what 8 bits leave is near what a stored scale can say
        assert float(found.sum()) < 0.98 * float(rounding.losses.sum())
    # In double precision, and without the grid's own rounding of scales, nothing is left to gain.
    for row in range(3):
        step = rounding.codes[row].double() - zeros[row][groups].double() * (not grid.real_zeros)
        bases = [torch.where(groups == g, step, 0) for g in range(scales.shape[1])]
        if grid.real_zeros:
            bases += [(groups == g).double() for g in range(scales.shape[1])]
        basis = torch.stack(bases, 1)
        root = torch.linalg.cholesky(hessian.double()).t()
        best = torch.linalg.lstsq(root @ basis, root @ weight[row].double()).solution
        least = ((root @ (weight[row].double() - basis @ best)) ** 2).sum()
        assert float(found[row]) >= float(least) * 0.999
        stored_exactly = grid.scale_dtype == torch.float16
        assert float(found[row]) <= float(least) * (1.05 if stored_exactly else 2.0)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_row_gets_worse(grid: Grid) -> None:
    weight, hessian = weight_of(2), hessian_of(3)
    rounding, groups = nearest(weight, grid, hessian)

    def again(params: tuple[Tensor, Tensor]) -> Rounding:
        scales, zeros = params
        codes = grid.encode(weight, scales[:, groups], zeros[:, groups]).to(torch.uint8)
        made = Rounding(codes, scales, zeros, torch.empty(0))
        made.losses = losses(weight - made.weight(groups), hessian)
        return made

    once = refine(rounding, weight, hessian, groups, grid, again, 0)
    twice = refine(rounding, weight, hessian, groups, grid, again, 2)
    assert bool((once.losses <= rounding.losses).all()) and bool((twice.losses <= once.losses * 1.0001).all())
    for made in (once, twice):
        assert torch.allclose(losses(weight - made.weight(groups), hessian), made.losses, rtol=1e-3)
        assert torch.equal(torch.stack(grid.settle(made.scales, made.zeros)), torch.stack((made.scales, made.zeros)))


@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("grid", [Grid(4, 32, False), Grid(4, 32, True), Grid(4, -1, False)], ids=str)
def test_gptq_gains_from_refits(grid: Grid, desc_act: bool) -> None:
    weight, hessian = weight_of(4), hessian_of(5)

    def loss(refits: int) -> float:
        options = SolverOptions(desc_act=desc_act, static_groups=desc_act, refits=refits)
        (tensor,) = solve(LayerProblem(["layer"], [weight.clone()], grid, hessian.clone(), options))
        assert isinstance(tensor, QuantizedTensor)
        return float(losses(weight - tensor.dequantize(), hessian).sum())

    plain, once, thrice = loss(0), loss(1), loss(3)
    assert once < plain and thrice <= once * 1.001


def test_a_row_of_zeros_and_a_column_never_seen_do_no_harm() -> None:
    weight, hessian = weight_of(), hessian_of()
    weight[0] = 0
    hessian[7], hessian[:, 7] = 0, 0
    options = SolverOptions(static_groups=True, refits=2)
    (tensor,) = solve(LayerProblem(["layer"], [weight], Grid(4, 32, True), hessian, options))
    made = tensor.dequantize()
    assert bool(torch.isfinite(made).all()) and bool((made[0] == 0).all()) and bool((made[:, 7] == 0).all())
