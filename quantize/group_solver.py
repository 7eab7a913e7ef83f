"""One group of layers that share an input, from statistics of it to scales, and from those to quantized layers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from quantize.activations import fixed_step
from quantize.config import VariantConfig
from quantize.errors import InputError
from quantize.grids import Grid, QuantizedTensor
from quantize.owners import Owner
from quantize.run import Run, solver_options
from quantize.smoothing import smoothing_scales
from quantize.solvers import SOLVERS, LayerProblem, ScaleProblem
from quantize.statistics import Statistics

log = logging.getLogger(__name__)

_WINDOWS = 8  # whole windows kept where scales are judged by a module's outputs


class GroupSolver:
    """Solves one variant's groups.

    Attributes:
        options: the solver's options.
        scales: whether channels are scaled before they are quantized.
        judges_modules: whether scales are judged by the outputs of the module that owns the layers.
        scale_statistics: makes an empty collection of what the choice of scales needs to know.
        statistics: the same of what solving needs to know.
    """

    def __init__(self, run: Run, variant: VariantConfig) -> None:
        self.run, self.variant = run, variant
        self.solver, self.options = SOLVERS[variant.solver.name], solver_options(run.config, variant)
        searches = self.solver.find_scales is not None
        self.scales = searches or self.options.smoothquant
        self.judges_modules = searches and self.options.search_loss == "module"
        windows = _WINDOWS if self.judges_modules else 0
        self.scale_statistics = functools.partial(Statistics, searches, not searches, means=searches, windows=windows)
        static = self.options.input_activations == "static"
        self.statistics = functools.partial(Statistics, self.solver.needs_calibration, static)

    def find_scales(
        self, names: list[str], statistics: Statistics, stored: Callable[[Tensor], Tensor], owner: Owner | None = None
    ) -> Tensor | None:
        """By what to divide the inputs of layers that share them, and to multiply the layers' columns.

        Args:
            names: full names of the layers.
            statistics: of their inputs, from :attr:`scale_statistics`.
            stored: gives the scales that wanted ones amount to where they go; ValueError refuses them.
            owner: the module by whose outputs scales are judged; None: the layers' own outputs count.

        Returns:
            float32 ``[in_features]``, positive; None: better left as they are.
        """
        if not statistics.count:
            return None
        weights = [self.run.walk.weight(name) for name in names]
        grids = [self.run.grid(self.variant, name) for name in names]
        if self.solver.find_scales is not None:
            windows = statistics.windows
            outputs = functools.partial(owner.error, windows) if owner is not None and windows else None
            hessian, means = statistics.hessian(), statistics.means()
            scales, alpha = self.solver.find_scales(ScaleProblem(weights, grids, hessian, means, self.options, stored, outputs))
        else:
            maxima, sample = statistics.maxima(), statistics.sample()
            scales, alpha = smoothing_scales(weights, grids[0], maxima, sample, self.options, stored)
        log.debug("%s: scaled with alpha %s", names[0], alpha)
        return None if alpha is None else scales

    def solve(
        self, names: list[str], statistics: Statistics, weight: Callable[[str], Tensor] | None = None
    ) -> dict[str, QuantizedTensor]:
        """Quantize layers that share an input; without statistics, to nearest.

        Args:
            names: full names of the layers.
            statistics: of their inputs, from :attr:`statistics`.
            weight: gives a layer's weight, float32 ``[out_features, in_features]``; None: the checkpoint's.

        Returns:
            The layers by full name.

        Raises:
            InputError: a static range is wanted of inputs that no calibration token reaches.
        """
        solver = self.solver if statistics.count else SOLVERS["rtn"]
        second_order = statistics.count and self.solver.needs_calibration
        hessian, drift = (statistics.hessian(), statistics.drift()) if second_order else (None, None)
        members: dict[Grid, list[str]] = {}
        for name in names:
            members.setdefault(self.run.grid(self.variant, name), []).append(name)
        layers: dict[str, QuantizedTensor] = {}
        for grid, on_grid in members.items():
            own = [(weight or self.run.walk.weight)(name) for name in on_grid]
            problem = LayerProblem(on_grid, own, grid, hessian, self.options, drift, statistics.count)
            layers.update(zip(on_grid, solver.solve(problem), strict=True))
        if self.options.input_activations == "static":
            step = self._input_step(names, statistics)
            layers = {name: replace(tensor, input_scale=step.clone()) for name, tensor in layers.items()}
        return layers

    def _input_step(self, names: list[str], statistics: Statistics) -> Tensor:
        if not statistics.count:
            raise InputError(
                f"no calibration token reaches {names[0]}, so its inputs' static range is unknown; use more "
                "calibration.num_samples or solver.input_activations=dynamic"
            )
        step = fixed_step(statistics.maxima(), statistics.sample(), self.options.observer, self.options.percentile)
        # Rounded like the weights' scales: consumers hold both in one type.
        grid = self.run.grid(self.variant, names[0])
        return grid.round_scale(step).to(grid.scale_dtype)
