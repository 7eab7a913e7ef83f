"""GPTQ: rounding with error feedback (Frantar et al. 2023, arXiv:2210.17323).

For one linear layer with weight ``W`` and inputs ``X``, minimise ``|W X - Q X|^2`` over grid values ``Q``. Columns are
rounded one after another; the error of each is compensated by the columns still to come. With ``H = 2 X X^T`` and the
upper Cholesky factor ``U`` of its inverse (``H^-1 = U^T U``), rounding column ``j`` and updating the rest is (eq. 2 and 3, in
the Cholesky form of the paper's algorithm 1)::

    q_j = grid(w_j)        e_j = (w_j - q_j) / U[j, j]        W[:, j+1:] -= e_j U[j, j+1:]

The sum of ``e_j^2`` over all columns is exactly the layer's loss. Updates beyond the current block of ``block_size`` columns
are saved up and applied as one matrix product ("lazy batch updates").

Two things go past the paper, and leave its loss and its format alone. The inputs of a layer are themselves damaged by the
quantization of earlier layers; :func:`make_good` moves the target so that the layer's *output* stays what it was in the
unquantized model (the objective of GPTAQ, arXiv:2504.02692, reached in closed form). And scales can be fitted to the codes, and
the columns rounded anew, where that lowers a row's loss (:mod:`quantize.solvers.refit`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.grids import Grid, QuantizedTensor
from quantize.solvers.base import LayerProblem, Solver, SolverOptions
from quantize.solvers.refit import fitted_scales

log = logging.getLogger(__name__)

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

    plan = plan_columns(hessian.diagonal(), grid, options)
    hessian = hessian[plan.order][:, plan.order]
    factor = inverse_factor(hessian, damping(options, len(hessian), problem.tokens), problem.names)
    drift = problem.drift if options.gptaq_alpha else None
    shift = None if drift is None else make_good(weight, options.gptaq_alpha * drift, factor, plan.order)
    weight[:, dead] = 0
    weight = weight[:, plan.order]
    if shift is not None:
        weight += shift

    codes, scales, zeros, loss = feed_back(weight, factor, hessian.diagonal(), grid, plan, options)
    if options.refits:
        # The loss that is fed back is the damped Hessian's.
        hessian.diagonal().add_(damping(options, len(hessian), problem.tokens) * hessian.diagonal().mean())
    for _ in range(options.refits):
        fitted = fitted_scales(weight, codes, scales, zeros, plan.groups, hessian, grid)
        trial = feed_back(weight, factor, hessian.diagonal(), grid, plan, options, grid.settle(fitted, zeros))
        better = (trial[3] < loss)[:, None]
        codes, scales, zeros = (
            torch.where(better, new, old) for new, old in zip(trial[:3], (codes, scales, zeros), strict=True)
        )
        loss = torch.minimum(loss, trial[3])
    log.debug("%s: loss %.4g", problem.names[0], float(loss.sum()))

    original = torch.argsort(plan.order)
    sizes = [w.shape[0] for w in problem.weights]
    return [
        QuantizedTensor(
            codes=part[:, original].contiguous(),
            scales=scale.to(grid.scale_dtype).contiguous(),
            zeros=zero.to(grid.zero_dtype).contiguous(),
            g_idx=plan.groups[original].to(torch.int32),
            grid=grid,
        )
        for part, scale, zero in zip(*(torch.split(t, sizes) for t in (codes, scales, zeros)), strict=True)
    ]


@dataclass(frozen=True)
class ColumnPlan:
    """In which order columns are rounded, and which of them share a scale.

    Attributes:
        order: int64 ``[columns]``: the original column that is rounded first, second, ...
        groups: int64 ``[columns]``: the grid group of each, in that order.
        static: scales are found before rounding starts, from the weights as they are.
    """

    order: Tensor
    groups: Tensor
    static: bool


def plan_columns(importance: Tensor, grid: Grid, options: SolverOptions) -> ColumnPlan:
    """Order and groups for columns whose Hessian diagonal is ``importance``, ``[columns]``.

    With ``desc_act`` alone, groups are formed along the order, so that columns of like importance share a scale; the
    artifact then needs a ``g_idx`` that is not monotonic, and kernels gather by it. ``static_groups`` and
    ``act_group_aware`` both round important columns first while groups stay consecutive columns.
    """
    columns = len(importance)
    size = grid.columns_per_group(columns)
    natural = torch.arange(columns, device=importance.device)
    groups = natural // size
    if options.act_group_aware:
        means = torch.zeros(grid.num_groups(columns), device=importance.device)
        counts = torch.bincount(groups).to(means.dtype)
        means.index_add_(0, groups, importance).div_(counts)
        if columns % size:
            means[-1] = -1  # a ragged group comes last, so that groups and lazy blocks end together
        # Two stable sorts make one lexicographic order: by the group's mean, then by the column's own importance.
        order = torch.argsort(importance, descending=True, stable=True)
        rank = torch.argsort(torch.argsort(means, descending=True, stable=True))
        order = order[torch.argsort(rank[groups[order]], stable=True)]
        return ColumnPlan(order, groups[order], options.static_groups)
    if not options.desc_act:
        return ColumnPlan(natural, groups, options.static_groups)
    order = torch.argsort(importance, descending=True, stable=True)
    return ColumnPlan(order, groups[order] if options.static_groups else groups, options.static_groups)


def damping(options: SolverOptions, columns: int, tokens: int | None) -> float:
    """``damp_percent``, raised where fewer tokens than columns were seen (an expert that the router seldom chose).

    ``n`` tokens span at most ``n`` of the ``columns`` directions, and what they say of those is noisy in proportion: the
    damping grows by ``columns / n``, which draws the result towards plain rounding as the evidence gets thin.
    """
    if tokens is None or tokens >= columns:
        return options.damp_percent
    return min(options.damp_percent * columns / max(tokens, 1), _MAX_DAMP)


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


def make_good(weight: Tensor, drift: Tensor, factor: Tensor, order: Tensor) -> Tensor:
    """What to add to ``weight`` so that it does to the damaged inputs what it did to the undamaged ones.

    ``|W X_ref - Q X|^2`` is, but for a constant, ``|W* X - Q X|^2`` with the least-squares target
    ``W* = W X_ref X^T (X X^T)^-1 = W + W (X_ref - X) X^T H^-1``, so that GPTQ itself need not change.

    Args:
        weight: float32 ``[rows, columns]``, columns in the layer's own order.
        drift: ``(X_ref - X) X^T`` on the scale of the Hessian, float32 ``[columns, columns]``, in the layer's own order.
        factor: ``U`` from :func:`inverse_factor`, in the order of rounding.
        order: the order of rounding.

    Returns:
        ``W* - W``, float32 ``[rows, columns]``, columns in the order of rounding.
    """
    return weight @ drift[:, order] @ factor.t() @ factor


def feed_back(
    weight: Tensor,
    factor: Tensor,
    importance: Tensor,
    grid: Grid,
    plan: ColumnPlan,
    options: SolverOptions,
    params: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round all columns in order, each with the error of those before it fed back.

    Args:
        weight: float32 ``[rows, columns]``, columns already in the order of rounding.
        factor: ``U`` from :func:`inverse_factor`.
        importance: the Hessian's diagonal, ``[columns]``: weight of a column's error in the scale search.
        grid: the grid.
        plan: which columns share a scale, and whether scales are found before rounding.
        options: ``block_size`` (raised to a multiple of the group size where one does not divide the other) and the search.
        params: scales and zeros to round with, float32 ``[rows, groups]`` each; None searches for them.

    Returns:
        codes uint8 ``[rows, columns]``, scales and zeros float32 ``[rows, groups]``, and the loss ``sum e^2`` of each row.
    """
    rows, columns = weight.shape
    size, block_size, search = grid.columns_per_group(columns), options.block_size, (options.search_steps, options.search_range)
    if size < columns and block_size % size and size % block_size:
        block_size = max(block_size // size, 1) * size
    # Column j of the layer is row j here: one column's work then touches consecutive memory.
    remaining = weight.t().contiguous()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    searches = params is None
    if params is None:
        scales = torch.empty(grid.num_groups(columns), rows, device=weight.device)
        zeros = torch.empty_like(scales)
    else:
        scales, zeros = (tensor.t().contiguous() for tensor in params)

    def choose_scale(group: int, members: Tensor) -> None:
        scales[group], zeros[group] = grid.find_params(remaining[members].t().contiguous(), importance[members], *search)

    group_of: list[int] = plan.groups.tolist()
    if searches and plan.static:
        for group in range(len(scales)):
            choose_scale(group, torch.nonzero(plan.groups == group)[:, 0])
        scales, zeros = (tensor.t().contiguous() for tensor in grid.settle(scales.t(), zeros.t()))
    loss = torch.zeros(rows, device=weight.device)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        errors = torch.empty(end - start, rows, device=weight.device)
        for j in range(start, end):
            group = group_of[j]
            if searches and not plan.static and (j == 0 or group != group_of[j - 1]):
                choose_scale(group, torch.arange(j, min(j + size, columns), device=weight.device))
            scale, zero = scales[group], zeros[group]
            code = grid.encode(remaining[j], scale, zero)
            codes[j] = code
            error = remaining[j].sub((code - zero) * scale).div_(factor[j, j])
            errors[j - start] = error
            if j + 1 < end:
                remaining[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        remaining[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
        loss += errors.square().sum(0)
    return codes.t(), scales.t(), zeros.t(), loss


SOLVER = Solver(quantizes=True, needs_calibration=True, solve=solve, makes_good=True, blocks=True)
