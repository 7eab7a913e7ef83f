"""AWQ: activation-aware weight quantization (Lin et al. 2024, arXiv:2306.00978).

A weight matters as much as the inputs it meets. Multiplying column ``j`` of a layer by ``s_j`` and dividing its inputs by it
changes nothing in exact arithmetic, and makes the rounding error of that column smaller relative to its group. Section 3.2
searches ``s`` in one dimension (eq. 4 and 5), and AutoAWQ weighs the columns' own size in as well ("duo scaling")::

    s_j = mean|X_j| ^ alpha / mean|W_j| ^ (1 - alpha)        alpha = argmin |W X - Q(W s) (X / s)|^2

with ``|W_j|`` relative to the largest weight of each group. Then the range of each group is clipped where that lowers the
error of its share of the output, and weights are rounded to nearest.

Neither search runs the model. A linear layer's output error is a quadratic form in the Hessian ``H = 2/n sum(x x^T)`` that was
collected in passing, ``|dW X|^2 = n/2 tr(dW H dW^T)``, and all candidates are evaluated as one batch. For clipping the same
holds group by group with the diagonal blocks of ``H``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantize.grids import Grid, QuantizedTensor, group_index, grouped
from quantize.solvers import gptq
from quantize.solvers.base import LayerProblem, ScaleProblem, Solver

# Numbers in one slice of a search. Small enough for a processor's cache, where these element-wise chains are several times
# faster than in memory.
_SLICE = 2**19
_SMALLEST = 1e-4  # of AutoAWQ: of a scale, and beside a power of the weights
_REFINEMENTS = 2  # halvings of the step of alpha around the best
_CLIP_RANGE = 0.5  # the most that a range is shrunk by, as in AutoAWQ
_SIDES = (1.15, 1.075, 0.925, 0.85)  # factors of one end of a range alone

Loss = Callable[[Tensor], Tensor]  # scales [candidates, in_features] -> error of each, [candidates]


def find_scales(problem: ScaleProblem) -> tuple[Tensor, float | None]:
    """The scales of a group's inputs with the least output error, ``[in_features]``, and their alpha (None: unscaled)."""
    magnitudes = relative_magnitudes(problem.weights, problem.grids)
    loss = layer_loss(problem.weights, problem.grids, problem.hessian)
    if problem.outputs is not None:
        loss = module_loss(problem.weights, problem.grids, problem.outputs)
    scales, alpha, _ = search_scales(problem.means, magnitudes, loss, problem.rounded, problem.options.alpha_steps)
    return scales, alpha


def relative_magnitudes(weights: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
    """Mean of ``|W|`` over all rows of layers that share an input, each weight relative to its group's largest: ``[in]``."""
    total = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight, grid in zip(weights, grids, strict=True):
        for rows in torch.split(weight, _rows_at_once(weight.shape[1])):
            groups = grouped(rows.abs(), grid)
            groups /= groups.amax(-1, keepdim=True) + 1e-6
            total += groups.flatten(-2)[..., : len(total)].sum(0)
    return total / sum(len(weight) for weight in weights)


def candidate_scales(means: Tensor, magnitudes: Tensor, alphas: Sequence[float]) -> Tensor:
    """Scales for each alpha, float32 ``[alphas, in_features]``, positive, with a geometric middle of 1.

    Args:
        means: mean magnitude of each input, ``[in_features]``.
        magnitudes: from :func:`relative_magnitudes`.
        alphas: between 0 (weights alone decide) and 1 (inputs alone).
    """
    exponents = torch.tensor(alphas, device=means.device, dtype=means.dtype)[:, None]
    scales = (means.pow(exponents) / (magnitudes.pow(1 - exponents) + _SMALLEST)).clamp(min=_SMALLEST)
    scales = scales / (scales.amax(1, keepdim=True) * scales.amin(1, keepdim=True)).sqrt()
    return torch.where(torch.isfinite(scales), scales, torch.ones_like(scales))


def search_scales(
    means: Tensor,
    magnitudes: Tensor,
    loss: Loss,
    rounded: Callable[[Tensor], Tensor] = lambda scales: scales,
    steps: int = 20,
    refinements: int = _REFINEMENTS,
) -> tuple[Tensor, float | None, float]:
    """Search alpha on a grid, then around its best point.

    Args:
        means: mean magnitude of each input, ``[in_features]``.
        magnitudes: from :func:`relative_magnitudes`.
        loss: the error of each of several scales.
        rounded: what scales ``[in_features]`` amount to once they are stored; ValueError leaves a candidate out.
        steps: alphas ``0, 1/steps, ..., 1 - 1/steps``: AutoAWQ's grid.
        refinements: how often the step is halved around the best; 0 is AutoAWQ's search, which does not try to leave the
            inputs as they are either.

    Returns:
        The best scales ``[in_features]``, their alpha (None: not to scale at all) and their loss.
    """
    best, chosen, least = torch.ones_like(means), None, float("inf")
    if refinements:
        least = float(loss(best[None]))
    tried: list[float] = [step / steps for step in range(steps)]
    for refinement in range(refinements + 1):
        alphas, scales = [], []
        for alpha, wanted in zip(tried, candidate_scales(means, magnitudes, tried), strict=True):
            try:
                scales.append(rounded(wanted))
            except ValueError:
                continue
            alphas.append(alpha)
        if alphas:
            losses = loss(torch.stack(scales))
            index = int(losses.argmin())
            if float(losses[index]) < least:
                best, chosen, least = scales[index], alphas[index], float(losses[index])
        if chosen is None:
            break
        step = 1 / (steps * 2 ** (refinement + 1))
        tried = [alpha for alpha in (chosen - step, chosen + step) if 0 <= alpha <= 1]
    return best, chosen, least


def scaled_round_trip(weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """What a layer amounts to with each of several scales, ``Q(W s) / s``: float32 ``[candidates, out, in]``.

    Args:
        weight: float32 ``[out, in]``.
        scales: ``[candidates, in]``.
        grid: min-max, as AutoAWQ has it while it searches.
    """
    groups = grouped(weight * scales[:, None], grid)
    scale, zero = grid.find_params(groups)
    rounded = grid.round_trip(groups, scale[..., None], zero[..., None])
    return rounded.flatten(-2)[..., : weight.shape[1]] / scales[:, None]


def layer_loss(weights: Sequence[Tensor], grids: Sequence[Grid], hessian: Tensor) -> Loss:
    """The error of the layers' own outputs, ``sum tr(dW H dW^T)``: no activations are needed, and memory is that of a slice."""

    def loss(scales: Tensor) -> Tensor:
        total = torch.zeros(len(scales), device=scales.device)
        for weight, grid in zip(weights, grids, strict=True):
            for rows in torch.split(weight, _rows_at_once(scales.numel())):
                error = scaled_round_trip(rows, scales, grid) - rows
                total += (torch.matmul(error, hessian) * error).sum((1, 2))
        return total

    return loss


def module_loss(weights: Sequence[Tensor], grids: Sequence[Grid], outputs: Callable[[list[Tensor]], Tensor]) -> Loss:
    """The error of what the module that owns the layers gives, as AutoAWQ takes it.

    Args:
        weights: of the layers.
        grids: of each.
        outputs: squared error ``[candidates]`` of the module's outputs for weights ``[candidates, out, in]`` of each layer.
    """

    def loss(scales: Tensor) -> Tensor:
        together = max(1, 16 * _SLICE // sum(weight.numel() for weight in weights))
        return torch.cat(
            [
                outputs([scaled_round_trip(weight, some, grid) for weight, grid in zip(weights, grids, strict=True)])
                for some in torch.split(scales, together)
            ]
        )

    return loss


def solve(problem: LayerProblem) -> list[QuantizedTensor]:
    """Clip each group's range by what that does to the layer's output, and round to nearest.

    Scaling has been done by then: weights and Hessian are those of scaled inputs.

    Raises:
        ValueError: the problem has no Hessian.
    """
    if problem.hessian is None:
        raise ValueError(f"AWQ needs the Hessian of {', '.join(problem.names)}")
    grid, solved = problem.grid, []
    blocks = hessian_blocks(problem.hessian, grid)
    for weight in problem.weights:
        columns = weight.shape[1]
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for rows in torch.split(weight.float(), _rows_at_once(columns)):
            groups = grouped(rows, grid).transpose(0, 1).contiguous()  # a group's rows together, for its block of H
            scale, zero = clipped_params(groups, blocks, grid, problem.options.search_steps)
            codes = grid.encode(groups, scale[..., None], zero[..., None]).to(torch.uint8)
            parts.append((codes.transpose(0, 1).flatten(1)[:, :columns], scale.t(), zero.t()))
        codes, scales, zeros = (torch.cat(tensors).contiguous() for tensors in zip(*parts, strict=True))
        index = group_index(columns, grid.group_size).to(weight.device)
        solved.append(QuantizedTensor(codes, scales.to(grid.scale_dtype), zeros.to(torch.uint8), index, grid))
    return solved


def clipped_params(groups: Tensor, blocks: Tensor, grid: Grid, steps: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, its range clipped where that lowers ``d H d^T`` for its rounding error ``d``.

    The candidates are AutoAWQ's, both ends clamped to a common magnitude that shrinks to half of the largest, in ``steps``
    steps; then each end alone is moved around the best.

    Args:
        groups: float32 ``[groups, rows, columns]``.
        blocks: from :func:`hessian_blocks`.
        grid: the grid.
        steps: candidates besides min-max; 0 takes min-max.

    Returns:
        scale and zero, float32 ``[groups, rows]``.
    """
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best = _Clip(groups, blocks, grid, low, high)
    reach = torch.maximum(-low, high)
    for step in range(1, steps + 1):
        limit = reach * (1 - _CLIP_RANGE * step / steps)
        best.try_range(torch.maximum(low, -limit), torch.minimum(high, limit))
    if steps:
        for factor in _SIDES:
            best.try_range(torch.maximum(best.low * factor, low), best.high)
            best.try_range(best.low, torch.minimum(best.high * factor, high))
    return best.scale, best.zero


class _Clip:
    """The best range of each group so far, and how good it is."""

    def __init__(self, groups: Tensor, blocks: Tensor, grid: Grid, low: Tensor, high: Tensor) -> None:
        self._groups, self._blocks, self._grid = groups, blocks, grid
        self.low, self.high = low, high
        self.scale, self.zero = grid.params_from_range(low, high)
        self._error = self._error_of(self.scale, self.zero)

    def try_range(self, low: Tensor, high: Tensor) -> None:
        """Take a range where it is better."""
        scale, zero = self._grid.params_from_range(low, high)
        error = self._error_of(scale, zero)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)
        self.scale, self.zero = torch.where(better, scale, self.scale), torch.where(better, zero, self.zero)

    def _error_of(self, scale: Tensor, zero: Tensor) -> Tensor:
        error = self._grid.round_trip(self._groups, scale[..., None], zero[..., None]).sub_(self._groups)
        return torch.bmm(error, self._blocks).mul_(error).sum(-1)


def hessian_blocks(hessian: Tensor, grid: Grid) -> Tensor:
    """The Hessian's diagonal blocks, one for each group: ``[groups, size, size]``; zero beyond a ragged last group."""
    size = grid.columns_per_group(len(hessian))
    blocks = hessian.new_zeros(grid.num_groups(len(hessian)), size, size)
    for block, start in zip(blocks, range(0, len(hessian), size), strict=True):
        part = hessian[start : start + size, start : start + size]
        block[: len(part), : len(part)] = part
    return blocks


def _rows_at_once(numbers_a_row: int) -> int:
    return max(1, _SLICE // numbers_a_row)


SOLVER = Solver(quantizes=True, needs_calibration=True, solve=solve, find_scales=find_scales)
AWQ_GPTQ = Solver(
    quantizes=True, needs_calibration=True, solve=gptq.solve, find_scales=find_scales, makes_good=True, blocks=True
)
