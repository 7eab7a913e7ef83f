"""No quantization: the checkpoint's weights pass through as they are (the FP16 baseline)."""

from __future__ import annotations

from quantize.grids import QuantizedTensor
from quantize.solvers.base import LayerProblem, Solver


def solve(problem: LayerProblem) -> list[QuantizedTensor]:
    """Nothing is quantized; the pipeline never calls this for a layer."""
    raise ValueError(f"solver 'none' quantizes nothing, but was given {', '.join(problem.names)}")


SOLVER = Solver(quantizes=False, needs_calibration=False, solve=solve, blocks=True)
