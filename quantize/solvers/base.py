"""What every solver is: a function from weights (and statistics of their inputs) to codes on a grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from quantize.grids import Grid, QuantizedTensor


@dataclass(frozen=True)
class SolverOptions:
    """Options shared by all solvers; each uses those that concern it.

    Attributes:
        desc_act: take columns in order of falling Hessian diagonal (AutoGPTQ's "activation order").
        damp_percent: added to the Hessian's diagonal, as a fraction of its mean.
        block_size: columns quantized before their error is passed on to the rest in one matrix product.
        quality: ``fast``, ``balanced`` or ``best``: effort spent on choosing scales.
    """

    desc_act: bool = True
    damp_percent: float = 0.01
    block_size: int = 128
    quality: str = "balanced"


@dataclass
class LayerProblem:
    """Linear layers that share one input, to be quantized on one grid.

    Attributes:
        names: full names of the layers, for messages.
        weights: float32 ``[out_features, in_features]`` each; ``in_features`` is the same for all.
        grid: the target grid.
        hessian: float32 ``[in_features, in_features]``, ``2/n * sum(x x^T)``; None for solvers without calibration.
        options: the solver's options.
    """

    names: list[str]
    weights: list[Tensor]
    grid: Grid
    hessian: Tensor | None
    options: SolverOptions


@dataclass(frozen=True)
class Solver:
    """A registry entry.

    Attributes:
        quantizes: False for the pass-through that leaves weights as they are.
        needs_calibration: whether :attr:`LayerProblem.hessian` must be filled.
        solve: gives one :class:`QuantizedTensor` for each weight, in order.
    """

    quantizes: bool
    needs_calibration: bool
    solve: Callable[[LayerProblem], list[QuantizedTensor]]
