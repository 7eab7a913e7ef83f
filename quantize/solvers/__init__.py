"""Solvers: how codes are chosen on a grid. One file each; a new method is one new file and one line below."""

from __future__ import annotations

from quantize.solvers import awq, bitsandbytes, gptq, none, rtn
from quantize.solvers.base import LayerProblem, ScaleProblem, Solver, SolverOptions

SOLVERS: dict[str, Solver] = {
    "none": none.SOLVER,
    "rtn": rtn.SOLVER,
    "gptq": gptq.SOLVER,
    "awq": awq.SOLVER,
    "awq+gptq": awq.AWQ_GPTQ,
    "llm_int8": bitsandbytes.LLM_INT8,
    "nf4": bitsandbytes.NF4,
}

__all__ = ["SOLVERS", "LayerProblem", "ScaleProblem", "Solver", "SolverOptions"]
