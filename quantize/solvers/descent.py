"""Coordinate descent on the codes: what GPTQ's single pass leaves on the table.

GPTQ decides each column once, knowing only the errors of the columns before it. Afterwards all errors are known, and the loss
``tr((W - Q) H (W - Q)^T)`` is still a quadratic in each single weight: with everything else fixed, column ``j`` is best at ::

    q_j + ((W - Q) H)_j / H_jj

rounded to its grid. A sweep visits every column once; the loss never rises (the discrete counterpart of Gauss-Seidel;
QuantEase, arXiv:2309.01885, algorithm 1, uses the same step from another start).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.grids import Grid

_BLOCK = 128  # columns between two lazy updates


def sweep(
    weight: Tensor, codes: Tensor, hessian: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, grid: Grid, sweeps: int
) -> Tensor:
    """Improve ``codes`` by up to ``sweeps`` passes; stops early when a pass changes nothing.

    Args:
        weight: the target, float32 ``[rows, columns]``.
        codes: uint8 ``[rows, columns]``, the starting point.
        hessian: float32 ``[columns, columns]``, symmetric, diagonal positive.
        scales: float32 ``[rows, groups]``.
        zeros: float32 ``[rows, groups]``.
        groups: int64 ``[columns]``, the group of each column.
        grid: the grid.
        sweeps: passes at most.

    Returns:
        uint8 ``[rows, columns]``.
    """
    columns = weight.shape[1]
    scale, zero = scales.t()[groups], zeros.t()[groups]  # [columns, rows]
    quantized = (codes.t().float() - zero).mul_(scale)
    # The gradient's half, ((W - Q) H)^T, kept current while columns change.
    gradient = hessian @ (weight.t() - quantized)
    diagonal = hessian.diagonal()
    for _ in range(sweeps):
        changed = False
        for start in range(0, columns, _BLOCK):
            end = min(start + _BLOCK, columns)
            steps = torch.zeros(end - start, weight.shape[0], device=weight.device)
            for j in range(start, end):
                best = grid.round_trip(quantized[j] + gradient[j] / diagonal[j], scale[j], zero[j])
                steps[j - start] = best - quantized[j]
                quantized[j] = best
                gradient[start:end].addr_(hessian[j, start:end], steps[j - start], alpha=-1)
            if bool(steps.any()):
                changed = True
                gradient[:start].addmm_(hessian[:start, start:end], steps, alpha=-1)
                gradient[end:].addmm_(hessian[end:, start:end], steps, alpha=-1)
        if not changed:
            break
    return (quantized / scale + zero).round_().to(torch.uint8).t()
