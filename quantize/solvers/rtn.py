"""Round-to-nearest: each weight goes to the nearest value of its group's min-max grid. No data is needed."""

from __future__ import annotations

from quantize.grids import QuantizedTensor, quantize_nearest
from quantize.solvers.base import LayerProblem, Solver


def solve(problem: LayerProblem) -> list[QuantizedTensor]:
    """Quantize each weight alone; the Hessian is ignored."""
    return [quantize_nearest(weight, problem.grid) for weight in problem.weights]


SOLVER = Solver(quantizes=True, needs_calibration=False, solve=solve, blocks=True)
