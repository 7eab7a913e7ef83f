"""LLM.int8() and NF4: bitsandbytes chooses the numbers, while its container is being written.

* ``llm_int8`` (Dettmers et al. 2022, arXiv:2208.07339): int8 weights, one scale a row, rounded to nearest; the inputs are coded
  while the model runs, and columns with outliers are kept out. :mod:`inference.llm_int8` has the arithmetic.
* ``nf4`` (Dettmers et al. 2023, arXiv:2305.14314, section 3): blocks of 64 weights on 16 quantiles of a normal distribution;
  ``double_quant`` codes the blocks' scales in 8 bits.

Each of these solvers names the one container whose program makes it, and the pipeline has no quantize step for them.
"""

from __future__ import annotations

from quantize.grids import QuantizedTensor
from quantize.solvers.base import LayerProblem, Solver


def solve(problem: LayerProblem) -> list[QuantizedTensor]:
    """The pipeline never calls this: :mod:`exports.bitsandbytes` quantizes."""
    raise ValueError(f"bitsandbytes quantizes {', '.join(problem.names)} as its container is written, not here")


LLM_INT8 = Solver(quantizes=True, needs_calibration=False, solve=solve, container="bitsandbytes", bits=8)
NF4 = Solver(quantizes=True, needs_calibration=False, solve=solve, container="bitsandbytes", bits=4)
