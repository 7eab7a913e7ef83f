"""Scales fitted to codes: the least-squares solution, and what rounding anew with them makes of the loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantize.gguf_grids import KINDS, gguf_grid
from quantize.grids import Grid
from quantize.solvers import LayerProblem, SolverOptions
from quantize.solvers.gptq import solve
from quantize.solvers.refit import fitted_scales


def correlated(columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns // 4, generator=generator) @ mixing
    inputs = (inputs + torch.randn(4 * columns, columns, generator=generator)) * torch.rand(columns, generator=generator)
    return inputs.t() @ inputs / len(inputs) + 1e-3 * torch.eye(columns)


def row_losses(target: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
    difference = (target - weight).double()
    return torch.einsum("ij,jk,ik->i", difference, hessian.double(), difference)


@given(seed=st.integers(0, 1000), count=st.sampled_from([1, 2, 5]), shuffled=st.booleans())
def test_fitted_scales_are_the_least_squares_solution(seed: int, count: int, shuffled: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = 3, 16 * count
    target, hessian = torch.randn(rows, columns, generator=generator), correlated(columns, seed)
    groups = torch.arange(columns) // 16
    groups = groups[torch.randperm(columns, generator=generator)] if shuffled else groups
    zeros = torch.full((rows, count), 8.0)
    codes = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.uint8)
    scales = torch.rand(rows, count, generator=generator) + 0.1
    found = fitted_scales(target, codes, scales, zeros, groups, hessian, gguf_grid("Q4_0"))
    root = torch.linalg.cholesky(hessian.double())
    for row in range(rows):
        # Each group's steps are one column of the system (root^T K) s = root^T w.
        steps = torch.zeros(columns, count, dtype=torch.float64)
        steps[torch.arange(columns), groups] = codes[row].double() - 8
        expected = torch.linalg.lstsq(root.t() @ steps, root.t() @ target[row].double()).solution
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-2, atol=1e-2)


def test_what_cannot_be_fitted_keeps_its_scale() -> None:
    target, hessian = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)), correlated(32, 0)
    codes = torch.full((2, 32), 8, dtype=torch.uint8)  # all zero: the equations are empty
    scales, zeros, groups = torch.full((2, 2), 0.5), torch.full((2, 2), 8.0), torch.arange(32) // 16
    assert torch.equal(fitted_scales(target, codes, scales, zeros, groups, hessian, gguf_grid("Q4_0")), scales)
    # A grid of positive scales takes no negative one: the target's sign is the opposite of the codes'.
    codes[:] = 15
    found = fitted_scales(-torch.ones(2, 32), codes, scales, zeros, groups, torch.eye(32), Grid(4, 16))
    assert torch.equal(found, scales)


def test_rows_are_fitted_in_parts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    target, hessian = torch.randn(10, 32, generator=generator), correlated(32, 3)
    codes = torch.randint(0, 16, (10, 32), generator=generator).to(torch.uint8)
    arguments = (target, codes, torch.ones(10, 2), torch.full((10, 2), 8.0), torch.arange(32) // 16, hessian, gguf_grid("Q4_0"))
    whole = fitted_scales(*arguments)
    monkeypatch.setattr("quantize.solvers.refit._SYSTEM_ELEMENTS", 12)  # three rows at once
    torch.testing.assert_close(fitted_scales(*arguments), whole)


@pytest.mark.parametrize("kind", [*KINDS, "int4", "int4-symmetric", "int3-order"])
def test_a_refit_never_raises_a_rows_loss(kind: str) -> None:
    grid: Grid = gguf_grid(kind) if kind in KINDS else Grid(int(kind[3]), 64, "symmetric" in kind)
    weight = torch.randn(24, 512, generator=torch.Generator().manual_seed(1)) * 0.05
    hessian = correlated(512, 2)
    losses = []
    for refits in (0, 1, 3):
        options = SolverOptions(desc_act=True, static_groups=kind in KINDS, search_steps=20, refits=refits)
        (found,) = solve(LayerProblem(["layer"], [weight], grid, hessian, options))
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(512)
        losses.append(row_losses(weight, found.dequantize(), damped))
    for less, more in ((losses[1], losses[0]), (losses[2], losses[1])):
        assert bool((less <= more * (1 + 1e-3)).all())
    assert float(losses[2].sum()) < 0.995 * float(losses[0].sum())
