"""Scales fitted to codes that are decided: the least-squares step that error feedback leaves open.

GPTQ chooses a group's scale before it rounds the group's columns, as if their errors stayed where they are; what is fed back is
not known by then. Once all codes ``c`` of a row are there, its loss is a quadratic in the row's scales ``s``::

    loss(s) = (w - sum_g s_g k_g)^T H (w - sum_g s_g k_g)        k_g: c - zero in the columns of group g, else 0
    sum_h (k_g^T H k_h) s_h = k_g^T H w                          for every group g

which one small system a row solves. Rounding anew with these scales may move codes again, so the two steps alternate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.grids import Grid

_SYSTEM_ELEMENTS = 2**24  # of the rows' systems that are held at once
_RIDGE = 1e-5  # of the mean diagonal: groups whose codes are all zero have no equation


def fitted_scales(
    target: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, hessian: Tensor, grid: Grid
) -> Tensor:
    """Scales that give the least loss for given codes, each a number that ``grid`` allows but not rounded to what is stored.

    Args:
        target: the weights aimed at, float32 ``[rows, columns]``.
        codes: uint8 ``[rows, columns]``.
        scales: those that the codes were rounded with, float32 ``[rows, groups]``; kept where the fit is not allowed.
        zeros: zero points, float32 ``[rows, groups]``.
        groups: int64 ``[columns]``: the group of each column.
        hessian: float32 ``[columns, columns]``, damped as it was for the codes; columns as in ``target``.
        grid: the grid.

    Returns:
        float32 ``[rows, groups]``.
    """
    rows = max(1, _SYSTEM_ELEMENTS // scales.shape[1] ** 2)
    parts = [slice(first, first + rows) for first in range(0, len(target), rows)]
    fitted = torch.cat([_fit(target[part], codes[part], scales[part], zeros[part], groups, hessian) for part in parts])
    return torch.where(grid.allows(fitted), fitted, scales)


def _fit(target: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, hessian: Tensor) -> Tensor:
    rows, count = scales.shape
    steps = codes.float() - zeros[:, groups]
    residual = (target - steps * scales[:, groups]) @ hessian
    matrix = torch.empty(rows, count, count, device=target.device)
    right = torch.zeros(rows, count, device=target.device).index_add_(1, groups, steps * residual)
    for group in range(count):
        members = torch.nonzero(groups == group)[:, 0]
        pulled = (steps[:, members] @ hessian[members]).mul_(steps)
        matrix[:, group] = torch.zeros(rows, count, device=target.device).index_add_(1, groups, pulled)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal.add_(_RIDGE * diagonal.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))
    solution: Tensor = torch.linalg.solve(matrix, right)
    return scales + solution
