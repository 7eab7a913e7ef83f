"""Scales fitted to codes that have been chosen, and codes chosen again by those scales.

GPTQ takes scales as given: they are found from the weights before a column is rounded. Once the codes are known, the layer's
output is linear in the scales, so those with the least error are a small system of equations for each row. With
``w_hat = sum_g s_g u_g`` (``u_g``: the codes of group ``g`` less its zero point, 0 elsewhere) the loss
``(w - w_hat) H (w - w_hat)^T`` is least where ::

    sum_g' (u_g H u_g'^T) s_g' = u_g H w^T

Rounding anew with these scales and fitting once more go down in turns; a row keeps the best that it has met.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.grids import Grid

_SLICE = 2**23  # numbers of an intermediate result
_DAMPING = 1e-3  # holds back scales that the codes hardly determine; relative to the diagonal


@dataclass
class Rounding:
    """Codes and what they mean, columns in the order of rounding.

    Attributes:
        codes: uint8 ``[rows, columns]``.
        scales: float32 ``[rows, groups]``.
        zeros: float32 ``[rows, groups]``.
        losses: ``e H e^T`` of each row's error ``e``, with the damped Hessian: float32 ``[rows]``.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    losses: Tensor

    def weight(self, groups: Tensor) -> Tensor:
        """The weight that this stands for, float32 ``[rows, columns]``; ``groups`` int64 ``[columns]``."""
        return (self.codes.float() - self.zeros[:, groups]) * self.scales[:, groups]


Params = tuple[Tensor, Tensor]  # scales and zeros, float32 [rows, groups]


def refine(
    first: Rounding,
    target: Tensor,
    hessian: Tensor,
    groups: Tensor,
    grid: Grid,
    again: Callable[[Params], Rounding],
    rounds: int,
) -> Rounding:
    """Fit scales and round by them in turns.

    Args:
        first: what to start from.
        target: float32 ``[rows, columns]``.
        hessian: damped, float32 ``[columns, columns]``.
        groups: int64 ``[columns]``, the group of each column.
        grid: the grid; says what scales it can store.
        again: rounds the target by given scales.
        rounds: turns.
    """
    best = current = first
    for turn in range(rounds + 1):
        scales, zeros = fit(current, target, hessian, groups, grid)
        fitted = Rounding(current.codes, scales, zeros, current.losses)
        fitted.losses = losses(target - fitted.weight(groups), hessian)
        best = _better(best, fitted)
        if turn < rounds:
            current = again((scales, zeros))
            best = _better(best, current)
    return best


def losses(error: Tensor, hessian: Tensor) -> Tensor:
    """``e H e^T`` of each row ``e``: float32 ``[rows]``."""
    return (error @ hessian).mul_(error).sum(1)


def fit(rounding: Rounding, target: Tensor, hessian: Tensor, groups: Tensor, grid: Grid) -> Params:
    """Scales with the least loss for codes as they are, as the grid stores them; zero points stay, unless they are real."""
    count = rounding.scales.shape[1]
    member = torch.nn.functional.one_hot(groups, count).to(target.dtype)
    scales, zeros = [], []
    rows_at_once = max(1, _SLICE // (count * len(groups)))
    gradient = (target - rounding.weight(groups)) @ hessian
    for start in range(0, len(target), rows_at_once):
        rows = slice(start, start + rows_at_once)
        codes, scale, zero = rounding.codes[rows].float(), rounding.scales[rows], rounding.zeros[rows]
        bases = [codes, torch.ones_like(codes)] if grid.real_zeros else [codes - zero[:, groups]]
        gram = torch.cat([torch.cat(_products(base, bases, hessian, member, groups), 2) for base in bases], 1)
        right = torch.cat([(gradient[rows] * base) @ member for base in bases], 1)
        gram.diagonal(dim1=1, dim2=2).mul_(1 + _DAMPING).add_(torch.finfo(torch.float32).tiny)
        step, failed = torch.linalg.solve_ex(gram, right)
        step[failed.bool() | ~torch.isfinite(step).all(1)] = 0
        moved = torch.split(step, count, 1)
        if grid.real_zeros:
            low = moved[1] - scale * zero
            scale = scale + moved[0]
            zero = -low / torch.where(scale == 0, 1, scale)
        else:
            scale = scale + moved[0]
        kept = grid.allows(scale)
        scales.append(torch.where(kept, scale, rounding.scales[rows]))
        zeros.append(torch.where(kept, zero, rounding.zeros[rows]))
    return grid.settle(torch.cat(scales), torch.cat(zeros))


def _products(base: Tensor, others: list[Tensor], hessian: Tensor, member: Tensor, groups: Tensor) -> list[Tensor]:
    """``u_g H v_g'^T`` of every row for one basis ``u`` and each other ``v``: ``[rows, groups, groups]`` each."""
    found: list[list[Tensor]] = [[] for _ in others]
    for group in range(member.shape[1]):
        columns = torch.nonzero(groups == group)[:, 0]
        product = base[:, columns] @ hessian[columns]
        for other, parts in zip(others, found, strict=True):
            parts.append((product * other) @ member)
    return [torch.stack(parts, 1) for parts in found]


def _better(best: Rounding, other: Rounding) -> Rounding:
    take = (other.losses < best.losses)[:, None]
    return Rounding(
        torch.where(take, other.codes, best.codes),
        torch.where(take, other.scales, best.scales),
        torch.where(take, other.zeros, best.zeros),
        torch.minimum(other.losses, best.losses),
    )
