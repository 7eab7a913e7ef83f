"""One group of layers that share an input, from statistics to quantized layers: scaling, solving, input ranges."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace

from torch import Tensor

from quantize.activations import fixed_step
from quantize.config import VariantConfig
from quantize.errors import InputError
from quantize.folding import Norm
from quantize.grids import Grid, QuantizedTensor
from quantize.run import Run, solver_options
from quantize.smoothing import smoothing_scales
from quantize.solvers import SOLVERS, LayerProblem
from quantize.statistics import Statistics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Solved:
    """Quantized layers that share an input.

    Attributes:
        layers: by full name.
        dense: parameters of the scaled norm, by name inside the block; empty where none was scaled.
        scales: what the inputs were divided by, ``[in_features]``; None: nothing.
    """

    layers: dict[str, QuantizedTensor]
    dense: dict[str, Tensor]
    scales: Tensor | None


class GroupSolver:
    """Solves one variant's groups.

    Attributes:
        options: the solver's options.
        statistics: makes an empty collection of what the solver needs to know.
    """

    def __init__(self, run: Run, variant: VariantConfig) -> None:
        self.run, self.variant = run, variant
        self.solver, self.options = SOLVERS[variant.solver.name], solver_options(run.config, variant)
        scaled_by_inputs = self.options.smoothquant or self.options.input_activations == "static"
        self.statistics = functools.partial(Statistics, self.solver.needs_calibration, scaled_by_inputs)

    def solve(self, names: list[str], statistics: Statistics, norm: Norm | None = None) -> Solved:
        """Quantize layers that share an input; without statistics, to nearest.

        Args:
            names: full names of the layers.
            statistics: of their inputs.
            norm: where the inputs come from, if that norm may be scaled.

        Raises:
            InputError: a static range is wanted of inputs that no calibration token reaches.
        """
        weights = {name: self.run.walk.weight(name) for name in names}
        scales: Tensor | None = None
        dense: dict[str, Tensor] = {}
        if norm is not None and statistics.count:
            scales, dense = self._smooth(norm, weights, statistics)
            weights = {name: weight * scales for name, weight in weights.items()}
        solver = self.solver if statistics.count else SOLVERS["rtn"]
        hessian, drift = None, None
        if statistics.count and self.solver.needs_calibration:
            hessian, drift = (_rescaled(matrix, scales) for matrix in (statistics.hessian(), statistics.drift()))
        members: dict[Grid, list[str]] = {}
        for name in names:
            members.setdefault(self.run.grid(self.variant, name), []).append(name)
        layers: dict[str, QuantizedTensor] = {}
        for grid, on_grid in members.items():
            own = [weights[name] for name in on_grid]
            problem = LayerProblem(on_grid, own, grid, hessian, self.options, drift, statistics.count)
            layers.update(zip(on_grid, solver.solve(problem), strict=True))
        if self.options.input_activations == "static":
            step = self._input_step(names, statistics, scales)
            layers = {name: replace(tensor, input_scale=step.clone()) for name, tensor in layers.items()}
        return Solved(layers, dense, scales)

    def _smooth(self, norm: Norm, weights: dict[str, Tensor], statistics: Statistics) -> tuple[Tensor, dict[str, Tensor]]:
        first = next(iter(weights))
        scales, alpha = smoothing_scales(
            list(weights.values()),
            self.run.grid(self.variant, first),
            statistics.maxima(),
            statistics.sample(),
            self.options,
            lambda wanted: norm.fold(wanted)[1],
        )
        log.debug("%s: smoothed with alpha %s", first, alpha)
        return (scales, {}) if alpha is None else (scales, norm.fold(scales)[0])

    def _input_step(self, names: list[str], statistics: Statistics, scales: Tensor | None) -> Tensor:
        if not statistics.count:
            raise InputError(
                f"no calibration token reaches {names[0]}, so its inputs' static range is unknown; use more "
                "calibration.num_samples or solver.input_activations=dynamic"
            )
        maxima, sample = statistics.maxima(), statistics.sample()
        if scales is not None:
            maxima, sample = maxima / scales, sample / scales
        step = fixed_step(maxima, sample, self.options.observer, self.options.percentile)
        # Rounded like the weights' scales: consumers hold both in one type.
        grid = self.run.grid(self.variant, names[0])
        return grid.round_scale(step).to(grid.scale_dtype)


def _rescaled(matrix: Tensor | None, scales: Tensor | None) -> Tensor | None:
    """A second-order statistic of inputs once they are divided by ``scales``."""
    return matrix if matrix is None or scales is None else matrix / scales / scales[:, None]
