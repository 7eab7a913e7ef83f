"""Which grid each layer gets: the least sum of divergences within the budget, and what lies beside it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from quantize.choices import overrides_for
from quantize.config import OverrideConfig, VariantConfig
from quantize.errors import InputError
from quantize.grids import Grid
from quantize.knapsack import Knapsack, Option

SCHEMA = 1


def choose(
    variant: VariantConfig,
    grids: Mapping[str, list[Grid]],
    options: Mapping[str, list[Option]],
    weights: Mapping[str, int],
) -> dict[str, Any]:
    """Solve the knapsack.

    Args:
        variant: whose solver names the budget.
        grids: of each layer, by full name.
        options: bytes and divergence of each of them.
        weights: how many weights each layer has.

    Returns:
        ``budget_bytes``, ``bytes`` and ``bits`` (mean bits a weight, scales and zero points included) of the choice,
        ``divergence`` (predicted: the sum over layers), ``exact``, ``line`` (the Pareto line, ``[bytes, divergence]``),
        ``uniform`` (each grid for all layers), ``overrides`` and ``layers``.

    Raises:
        InputError: nothing fits the budget.
    """
    solver, total = variant.solver, sum(weights.values())
    knapsack = Knapsack(list(options.values()))
    budget = solver.budget_bytes if solver.budget_bytes is not None else int((solver.budget_bits or 0) * total / 8)
    if budget < knapsack.smallest:
        works = -(-knapsack.smallest * 8 * 1000 // total) / 1000
        given = f"budget_bytes={budget}" if solver.budget_bytes is not None else f"budget_bits={solver.budget_bits}"
        raise InputError(
            f"solver.{given} is below what the smallest of solver.bit_choices take with their scales; use "
            f"solver.budget_bits={works:g} (solver.budget_bytes={knapsack.smallest}) or more"
        )
    picked = dict(zip(options, knapsack.choose(budget), strict=True))
    size, cost = knapsack.total(list(picked.values()))
    chosen = {layer: grids[layer][number] for layer, number in picked.items()}
    free = {layer: grid for layer, grid in chosen.items() if not _pinned(solver.overrides, layer)}
    return {
        "schema": SCHEMA,
        "sensitivity": solver.sensitivity,
        "budget_bytes": budget,
        "bytes": size,
        "bits": 8 * size / total,
        "divergence": cost,
        "exact": knapsack.exact,
        "line": [list(point) for point in knapsack.line()],
        "uniform": _uniform(grids, options),
        "overrides": [asdict(override) for override in overrides_for(solver, free)],
        "layers": {
            layer: {
                **_described(chosen[layer]),
                "choices": [
                    {**_described(grid), "bytes": option.size, "divergence": option.cost}
                    for grid, option in zip(grids[layer], options[layer], strict=True)
                ],
            }
            for layer in options
        },
    }


def _pinned(overrides: Sequence[OverrideConfig], layer: str) -> bool:
    return any(re.search(override.match, layer) for override in overrides)


def _described(grid: Grid) -> dict[str, int]:
    return {"bits": grid.bits, "group_size": grid.group_size}


def _uniform(grids: Mapping[str, list[Grid]], options: Mapping[str, list[Option]]) -> list[dict[str, Any]]:
    """Every grid that all layers can be on, as the choice for all of them (those with one choice keep it)."""
    free = {layer: choices for layer, choices in grids.items() if len(choices) > 1}
    found = []
    for grid in dict.fromkeys(grid for choices in free.values() for grid in choices):
        with contextlib.suppress(ValueError):  # a layer that cannot be on it
            numbers = {layer: choices.index(grid) if layer in free else 0 for layer, choices in grids.items()}
            picked = [options[layer][number] for layer, number in numbers.items()]
            size, cost = sum(option.size for option in picked), sum(option.cost for option in picked)
            found.append({**_described(grid), "bytes": size, "divergence": cost})
    return found
