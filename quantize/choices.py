"""The grids among which a budget lets every layer choose, and the recipe's overrides that say what was chosen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quantize.config import OverrideConfig, SolverConfig
from quantize.errors import InputError
from quantize.grids import Grid

_KEYS = {"bits", "group_size"}


def budgeted(solver: SolverConfig) -> bool:
    """Whether bits are chosen layer by layer under a budget."""
    return solver.budget_bits is not None or solver.budget_bytes is not None


def candidate_grids(solver: SolverConfig) -> list[Grid]:
    """The grids of ``solver.bit_choices``, none twice; an entry without ``group_size`` takes the solver's.

    Raises:
        InputError: an entry that is neither bits nor ``{bits, group_size}``, or an impossible one; or no entry at all.
    """
    grids = []
    for entry in solver.bit_choices:
        choice = entry if isinstance(entry, Mapping) else {"bits": entry}
        values = {"group_size": solver.group_size, **choice}
        if values.keys() != _KEYS or not all(type(value) is int for value in values.values()):
            raise InputError(f"solver.bit_choices: {entry!r} is no choice; use bits, such as 4, or {{bits: 4, group_size: 64}}")
        grids.append(Grid(values["bits"], values["group_size"], solver.symmetric))
    if not grids:
        raise InputError("solver.bit_choices=[] leaves nothing to choose; use [3, 4, 8]")
    return list(dict.fromkeys(grids))


def overrides_for(solver: SolverConfig, chosen: Mapping[str, Grid]) -> list[OverrideConfig]:
    """``solver.overrides`` that put each layer on its grid, one entry for each grid that is not the solver's own."""
    members: dict[tuple[int, int], list[str]] = {}
    for name, grid in chosen.items():
        if (grid.bits, grid.group_size) != (solver.bits, solver.group_size):
            members.setdefault((grid.bits, grid.group_size), []).append(name)
    return [
        OverrideConfig(match=pattern(names), bits=bits, group_size=group_size)
        for (bits, group_size), names in sorted(members.items())
    ]


def pattern(names: Iterable[str]) -> str:
    """A regular expression that matches these full names and no others."""
    return f"^(?:{'|'.join(map(re.escape, names))})$"


def override_from(stored: Mapping[str, Any]) -> OverrideConfig:
    """An override as a step's result has it."""
    return OverrideConfig(**stored)
