"""What every solver is: a function from weights (and statistics of their inputs) to codes on a grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from quantize.grids import Grid, QuantizedTensor


@dataclass(frozen=True)
class SolverOptions:
    """Options shared by all solvers; each uses those that concern it. ``docs/gptq.md`` says what each buys.

    Attributes:
        desc_act: take columns in order of falling Hessian diagonal (AutoGPTQ's "activation order").
        static_groups: groups are consecutive columns whose scales are fixed before any rounding, whatever the order.
        act_group_aware: groups are consecutive columns; whole groups are ordered by importance, and columns inside a group.
        damp_percent: added to the Hessian's diagonal, as a fraction of its mean.
        block_size: columns quantized before their error is passed on to the rest in one matrix product.
        search_steps: candidates of the Hessian-weighted scale search (AWQ: of clipping) besides the min-max range; 0 takes
            min-max.
        search_range: the largest shrinkage of the range that is tried, in [0, 1).
        refits: times that scales are fitted to the codes by least squares and the columns rounded anew.
        gptaq_alpha: share of the inputs' error that the weights are to make good, 0 (none) to 1 (all).
        tune_epochs: passes over the calibration windows in which a block's scales and norms are tuned together.
        input_activations: ``none``, ``dynamic``, ``static``: how inputs are quantized (:mod:`quantize.activations`).
        observer: how a static range is found.
        percentile: for ``observer=percentile``.
        smoothquant: scale norms and the layers behind them so that inputs are easier to quantize (:mod:`quantize.smoothing`).
        smoothquant_alpha: its strength; None searches.
        alpha_steps: strengths of AWQ's scaling that are tried before the best is refined.
        search_loss: what AWQ's scales are judged by: ``layer``, the outputs of the layers that are scaled, or ``module``,
            those of the attention or MLP that owns them.
    """

    desc_act: bool = True
    static_groups: bool = False
    act_group_aware: bool = False
    damp_percent: float = 0.01
    block_size: int = 128
    search_steps: int = 40
    search_range: float = 0.6
    refits: int = 0
    gptaq_alpha: float = 0.0
    tune_epochs: int = 0
    input_activations: str = "none"
    observer: str = "minmax"
    percentile: float = 99.99
    smoothquant: bool = False
    smoothquant_alpha: float | None = None
    alpha_steps: int = 20
    search_loss: str = "layer"


@dataclass
class LayerProblem:
    """Linear layers that share one input, to be quantized on one grid.

    Attributes:
        names: full names of the layers, for messages.
        weights: float32 ``[out_features, in_features]`` each; ``in_features`` is the same for all.
        grid: the target grid.
        hessian: float32 ``[in_features, in_features]``, ``2/n * sum(x x^T)``; None for solvers without calibration.
        options: the solver's options.
        drift: float32 ``[in_features, in_features]``, ``2/n * sum((x_ref - x) x^T)`` with ``x_ref`` the input in the
            unquantized model; None where it was not collected.
        tokens: the number ``n`` of inputs in the statistics.
    """

    names: list[str]
    weights: list[Tensor]
    grid: Grid
    hessian: Tensor | None
    options: SolverOptions
    drift: Tensor | None = None
    tokens: int | None = None


@dataclass
class ScaleProblem:
    """Linear layers that share one input whose channels may be scaled, and what the scales are to be judged by.

    Attributes:
        weights: float32 ``[out_features, in_features]`` each, not scaled yet.
        grids: the grid of each.
        hessian: float32 ``[in_features, in_features]``, ``2/n * sum(x x^T)``.
        means: mean magnitude of each input, float32 ``[in_features]``.
        options: the solver's options.
        rounded: gives the scales that remain once they are folded into what is stored in 16 bits; may raise ValueError where
            they do not fit.
        outputs: gives the squared error ``[candidates]`` of the outputs of the module that owns the layers, for weights
            ``[candidates, out_features, in_features]`` of each; None: the layers' own outputs count.
    """

    weights: list[Tensor]
    grids: list[Grid]
    hessian: Tensor
    means: Tensor
    options: SolverOptions
    rounded: Callable[[Tensor], Tensor] = lambda scales: scales
    outputs: Callable[[list[Tensor]], Tensor] | None = None


@dataclass(frozen=True)
class Solver:
    """A registry entry.

    Attributes:
        quantizes: False for the pass-through that leaves weights as they are.
        needs_calibration: whether :attr:`LayerProblem.hessian` must be filled.
        solve: gives one :class:`QuantizedTensor` for each weight, in order.
        container: the only container for what this solver stands for, whose program chooses the numbers as the artifact is
            written; None where :attr:`solve` chooses them.
        bits: the only bits there are; None where the recipe says.
        find_scales: gives the scales of a group's inputs ``[in_features]`` and their strength (None: unscaled); None where the
            solver does not scale.
        blocks: whether what it makes can be stored in a container whose files come in types (GGUF's block formats).
        makes_good: whether it uses :attr:`LayerProblem.drift`.
    """

    quantizes: bool
    needs_calibration: bool
    solve: Callable[[LayerProblem], list[QuantizedTensor]]
    container: str | None = None
    bits: int | None = None
    find_scales: Callable[[ScaleProblem], tuple[Tensor, float | None]] | None = None
    makes_good: bool = False
    blocks: bool = False
