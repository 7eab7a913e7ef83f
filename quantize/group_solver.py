"""One group of layers that share an input, from statistics to quantized layers: scaling, solving, input ranges."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from quantize.activations import fixed_step
from quantize.config import VariantConfig
from quantize.errors import InputError
from quantize.folding import Norm
from quantize.grids import Grid, QuantizedTensor
from quantize.owners import Owner
from quantize.run import Run, solver_options
from quantize.smoothing import smoothing_scales
from quantize.solvers import SOLVERS, LayerProblem, ScaleProblem
from quantize.statistics import Statistics

log = logging.getLogger(__name__)

_WINDOWS = 8  # whole windows kept where scales are judged by a module's outputs


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
        scales: whether norms are scaled.
        moves_scales: whether scales are moved from one linear layer to another as well.
        judges_modules: whether scales are judged by the outputs of the module that owns the layers.
    """

    def __init__(self, run: Run, variant: VariantConfig) -> None:
        self.run, self.variant = run, variant
        self.solver, self.options = SOLVERS[variant.solver.name], solver_options(run.config, variant)
        self.moves_scales = self.solver.find_scales is not None
        self.scales = self.moves_scales or self.options.smoothquant
        self.judges_modules = self.moves_scales and self.options.search_loss == "module"
        scaled_by_inputs = self.options.smoothquant or self.options.input_activations == "static"
        self.statistics = functools.partial(
            Statistics,
            self.solver.needs_calibration,
            scaled_by_inputs,
            means=self.moves_scales,
            windows=_WINDOWS if self.judges_modules else 0,
        )

    def solve(
        self,
        names: list[str],
        statistics: Statistics,
        norm: Norm | None = None,
        owner: Owner | None = None,
        weight: Callable[[str], Tensor] | None = None,
    ) -> Solved:
        """Quantize layers that share an input; without statistics, to nearest.

        Args:
            names: full names of the layers.
            statistics: of their inputs.
            norm: where the inputs come from, if that norm may be scaled.
            owner: the module by whose outputs scales are judged; None: the layers' own outputs count.
            weight: gives a layer's weight, float32 ``[out_features, in_features]``; None: the checkpoint's.

        Raises:
            InputError: a static range is wanted of inputs that no calibration token reaches.
        """
        weights = {name: (weight or self.run.walk.weight)(name) for name in names}
        scales: Tensor | None = None
        dense: dict[str, Tensor] = {}
        if norm is not None and statistics.count:
            scales, dense = self._scale(norm, weights, statistics, owner)
            weights = {name: own * scales for name, own in weights.items()}
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

    def link_scales(self, name: str, statistics: Statistics, shared: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Scales of one layer's inputs that come from another linear layer, ``[in_features]``; None: better none.

        Args:
            name: the layer's full name.
            statistics: of its inputs.
            shared: makes scales equal that have to be.
        """
        if self.solver.find_scales is None or not statistics.count:
            return None
        grid = self.run.grid(self.variant, name)
        weights = [self.run.walk.weight(name)]
        problem = ScaleProblem(weights, [grid], statistics.hessian(), statistics.means(), self.options, shared)
        scales, alpha = self.solver.find_scales(problem)
        log.debug("%s: scaled with alpha %s", name, alpha)
        return None if alpha is None else scales

    def _scale(
        self, norm: Norm, weights: dict[str, Tensor], statistics: Statistics, owner: Owner | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        first, stored = next(iter(weights)), lambda wanted: norm.fold(wanted)[1]
        grids = [self.run.grid(self.variant, name) for name in weights]
        if self.solver.find_scales is not None:
            windows = statistics.windows
            problem = ScaleProblem(
                list(weights.values()),
                grids,
                statistics.hessian(),
                statistics.means(),
                self.options,
                stored,
                functools.partial(owner.error, windows) if owner is not None and windows else None,
            )
            scales, alpha = self.solver.find_scales(problem)
        else:
            maxima, sample = statistics.maxima(), statistics.sample()
            scales, alpha = smoothing_scales(list(weights.values()), grids[0], maxima, sample, self.options, stored)
        log.debug("%s: scaled with alpha %s", first, alpha)
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
