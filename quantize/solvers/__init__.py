"""Solvers: how codes are chosen on a grid. One file each; a new method is one new file and one line below."""

from __future__ import annotations

from quantize.solvers import gptq, none, rtn
from quantize.solvers.base import LayerProblem, Solver, SolverOptions

SOLVERS: dict[str, Solver] = {
    "none": none.SOLVER,
    "rtn": rtn.SOLVER,
    "gptq": gptq.SOLVER,
}

__all__ = ["SOLVERS", "LayerProblem", "Solver", "SolverOptions"]
