"""GPTQ: rounding with error feedback (Frantar et al. 2023, arXiv:2210.17323).

For one linear layer with weight ``W`` and inputs ``X``, minimise ``|W X - Q X|^2`` over grid values ``Q``. Columns are
rounded one after another; the error of each is compensated by the columns still to come. With ``H = 2 X X^T`` and the
upper Cholesky factor ``U`` of its inverse (``H^-1 = U^T U``), rounding column ``j`` and updating the rest is (eq. 2 and 3, in
the Cholesky form of the paper's algorithm 1)::

    q_j = grid(w_j)        e_j = (w_j - q_j) / U[j, j]        W[:, j+1:] -= e_j U[j, j+1:]

The sum of ``e_j^2`` over all columns is exactly the layer's loss. Updates beyond the current block of ``block_size`` columns
are saved up and applied as one matrix product ("lazy batch updates").
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from quantize.grids import Grid, QuantizedTensor
from quantize.solvers.base import LayerProblem, Solver

log = logging.getLogger(__name__)

# Candidates of the Hessian-weighted scale search (Grid.find_params) and the largest range shrinkage tried.
SEARCH = {"fast": (20, 0.5), "balanced": (40, 0.6), "best": (80, 0.6)}
_MAX_DAMP = 1.0


def solve(problem: LayerProblem) -> list[QuantizedTensor]:
    """Quantize layers that share an input together: they share the factorisation, and rows never interact.

    Raises:
        ValueError: the problem has no Hessian.
    """
    if problem.hessian is None:
        raise ValueError(f"GPTQ needs the Hessian of {', '.join(problem.names)}")
    options, grid = problem.options, problem.grid
    weight = torch.cat([w.float() for w in problem.weights])
    hessian = problem.hessian.clone()

    # An input that was always zero says nothing about its column; its weights do not matter and become zero.
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0

    columns = weight.shape[1]
    if options.desc_act:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    else:
        order = torch.arange(columns, device=weight.device)
    hessian = hessian[order][:, order]
    factor = inverse_factor(hessian, options.damp_percent, problem.names)
    codes, scales, zeros, loss = feed_back(
        weight[:, order], factor, hessian.diagonal(), grid, options.block_size, SEARCH[options.quality]
    )
    log.debug("%s: loss %.4g", problem.names[0], loss)

    original = torch.argsort(order)
    group_of_rank = (torch.arange(columns, device=weight.device) // grid.columns_per_group(columns)).to(torch.int32)
    sizes = [w.shape[0] for w in problem.weights]
    return [
        QuantizedTensor(
            codes=part[:, original].contiguous(),
            scales=scale.to(grid.scale_dtype).contiguous(),
            zeros=zero.to(torch.uint8).contiguous(),
            g_idx=group_of_rank[original],
            grid=grid,
        )
        for part, scale, zero in zip(*(torch.split(t, sizes) for t in (codes, scales, zeros)), strict=True)
    ]


def inverse_factor(hessian: Tensor, damp_percent: float, names: list[str]) -> Tensor:
    """The upper triangular ``U`` with ``(H + damping)^-1 = U^T U``.

    ``H`` is never inverted: for the reversal ``J`` (rows and columns backwards), ``J H J = L L^T`` gives ``H = R R^T`` with
    the upper triangular ``R = J L J``, so ``U = R^-1``. One Cholesky factorisation and one triangular solve.

    Args:
        hessian: float32 ``[n, n]``, symmetric, positive semi-definite.
        damp_percent: damping as a fraction of the mean diagonal; raised tenfold while the factorisation fails.
        names: the layers, for the log.

    Raises:
        ValueError: the Hessian holds NaN or infinity, or no damping up to 100 % helps.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(f"the Hessian of {', '.join(names)} holds NaN or infinity, and so do the layers' inputs")
    mean = hessian.diagonal().mean()
    damp = damp_percent
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            break
        if damp >= _MAX_DAMP:
            raise ValueError(f"the Hessian of {', '.join(names)} is not positive semi-definite; no damping mends that")
        damp = min(max(damp, 1e-3) * 10, _MAX_DAMP)
        log.warning("%s: Hessian is not positive definite; damp_percent raised to %g", ", ".join(names), damp)
    identity = torch.eye(len(hessian), device=hessian.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.flip(0, 1)


def feed_back(
    weight: Tensor, factor: Tensor, importance: Tensor, grid: Grid, block_size: int, search: tuple[int, float]
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Round all columns in order, each with the error of those before it fed back.

    Args:
        weight: float32 ``[rows, columns]``, columns already in the order of rounding.
        factor: ``U`` from :func:`inverse_factor`.
        importance: the Hessian's diagonal, ``[columns]``: weight of a column's error in the scale search.
        grid: the grid; every ``group_size`` columns in this order share a scale.
        block_size: columns in a lazy block; raised to a multiple of the group size where one does not divide the other.
        search: candidates and range of the scale search.

    Returns:
        codes uint8 ``[rows, columns]``, scales and zeros float32 ``[rows, groups]``, and the loss ``sum e^2``.
    """
    rows, columns = weight.shape
    group_size = grid.columns_per_group(columns)
    if group_size < columns and block_size % group_size and group_size % block_size:
        block_size = max(block_size // group_size, 1) * group_size
    # Column j of the layer is row j here: one column's work then touches consecutive memory.
    remaining = weight.t().contiguous()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    loss = 0.0
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        errors = torch.empty(end - start, rows, device=weight.device)
        for j in range(start, end):
            if j % group_size == 0:
                stop = min(j + group_size, columns)
                scale, zero = grid.find_params(remaining[j:stop].t().contiguous(), importance[j:stop], *search)
                scales.append(scale)
                zeros.append(zero)
            column = remaining[j]
            code = grid.encode(column, scale, zero)
            codes[j] = code
            error = column.sub((code - zero) * scale).div_(factor[j, j])
            errors[j - start] = error
            if j + 1 < end:
                remaining[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        remaining[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
        loss += float(errors.square().sum())
    return codes.t(), torch.stack(scales, 1), torch.stack(zeros, 1), loss


SOLVER = Solver(quantizes=True, needs_calibration=True, solve=solve)
