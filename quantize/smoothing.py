"""SmoothQuant: make inputs easier to quantize at the weights' expense (Xiao et al. 2023, arXiv:2211.10438).

A few input channels are a hundred times larger than the rest and take the 8-bit steps of all. Dividing channel ``j`` of the
inputs by ``s_j`` and multiplying the weights' column ``j`` by it changes nothing in exact arithmetic; eq. 4 of the paper::

    s_j = max|X_j| ^ alpha / max|W_j| ^ (1 - alpha)

The paper takes one ``alpha`` for a model. Here it is searched for each norm by what counts, the error of the layers' quantized
outputs on calibration tokens; not smoothing at all is among the candidates, so a norm is never made worse on those.

One exponent for all channels is a guess at the shape of ``s``. From the best one every ``s_j`` is then moved on by gradient
descent on what rounding does to the outputs. Rounding errors are as good as independent and uniform, so the expected squared
error has a closed form in the steps ``d`` of the tokens' inputs and of the weights' rows, and no rounding is needed::

    E = 1/12 sum_t d_t^2 sum_j s_j^2 |W_j|^2  +  1/12 sum_i d_i^2 sum_j |X_j|^2 / s_j^2
    d_t = max_j |x_tj| / s_j / 127.5          d_i = max_j |W_ij| s_j / 127.5

The result is taken if the real error, with rounding, is lower than that of the best exponent.

Both errors weigh token ``t`` by ``1 / (|y_t|^2 + 10 median |y|^2)``, with ``y`` the layers' outputs: about equally, but for the
few tokens, often the first, whose outputs are hundreds of times larger than all others. Those would have the scales to
themselves (one channel of one layer 1,900 times the rest, and all other weights' rounding 8 times coarser), though what follows
normalizes them to the size of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantize.activations import fixed_step, quantize_inputs, token_steps
from quantize.grids import Grid, grouped, quantize_nearest
from quantize.solvers.base import SolverOptions

_ALPHAS = tuple(step / 10 for step in range(11))
_SMALLEST = 1e-5
_TYPICAL = 10  # times the median energy of outputs, up to which tokens count about equally
_STEPS = 100  # of gradient descent
_RATE = 0.05  # of the logarithms of the scales, falling to 0
_ROWS = 512  # of the weights, evenly spread, whose steps count in descent

Round = Callable[[Tensor], Tensor]  # scales to what they amount to once they are stored


def smoothing_scales(
    weights: Sequence[Tensor], grid: Grid, maxima: Tensor, sample: Tensor, options: SolverOptions, rounded: Round
) -> tuple[Tensor, float | None]:
    """The scales of a group's inputs with the least output error, and the ``alpha`` they start from (None: better unscaled).

    Args:
        weights: float32 ``[out_features, in_features]`` of the layers that read the inputs.
        grid: the grid of the weights.
        maxima: the largest magnitude of each input channel, float32 ``[in_features]``.
        sample: some of the inputs, float32 ``[rows, in_features]``.
        options: ``smoothquant_alpha`` (None searches and descends), and how inputs are quantized.
        rounded: gives the scales that remain after what is divided by them is stored; may raise ValueError where they do not
            fit, and that candidate is then left out.

    Returns:
        float32 ``[in_features]``, positive, and alpha.
    """
    weight = torch.cat([w.float() for w in weights])
    columns, target = weight.abs().amax(0), sample @ weight.t()
    importance = _importance(target)

    def error(scales: Tensor) -> float:
        inputs, quantized = sample / scales, quantize_nearest(weight * scales, grid).dequantize()
        if options.input_activations == "dynamic":
            inputs = quantize_inputs(inputs, token_steps(inputs))
        elif options.input_activations == "static":
            inputs = quantize_inputs(inputs, fixed_step(maxima / scales, inputs, options.observer, options.percentile))
        return float(((inputs @ quantized.t() - target).square().sum(1) * importance).sum())

    best, chosen = torch.ones_like(maxima), None
    if options.smoothquant_alpha is not None:
        try:
            return rounded(_scales(maxima, columns, options.smoothquant_alpha)), options.smoothquant_alpha
        except ValueError:
            return best, None
    least = error(best)
    for alpha in _ALPHAS:
        try:
            scales = rounded(_scales(maxima, columns, alpha))
        except ValueError:
            continue
        found = error(scales)
        if found < least:
            best, chosen, least = scales, alpha, found
    if chosen is not None:
        scales = _descend(best, _ExpectedError(weight, grid, maxima, sample, importance, options.input_activations), rounded)
        if error(scales) < least:
            best = scales
    return best, chosen


def _importance(outputs: Tensor) -> Tensor:
    """What each token's squared error counts, ``[tokens]``, from its outputs ``[tokens, out_features]``."""
    energies = outputs.square().sum(1)
    floor = _TYPICAL * energies.median()
    return 1 / (energies + floor).clamp(min=torch.finfo(energies.dtype).tiny)


def _scales(maxima: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """Equation 4, with a geometric middle of 1: a common factor changes nothing but the norm's range."""
    scales = maxima.clamp(min=_SMALLEST) ** alpha / columns.clamp(min=_SMALLEST) ** (1 - alpha)
    # A channel that is always zero needs no scale.
    scales = torch.where(maxima > 0, scales, torch.ones_like(scales))
    return scales / (scales.max() * scales.min()).sqrt()


@torch.enable_grad()
def _descend(start: Tensor, expected: Callable[[Tensor], Tensor], rounded: Round) -> Tensor:
    """Scales with a lower expected error, from ``start`` on; as they remain once they are stored."""
    logarithms = start.log().requires_grad_()
    optimizer = torch.optim.Adam([logarithms], _RATE)
    best, least = start, float("inf")
    for step in range(_STEPS):
        wanted = logarithms.exp()
        try:
            stored = rounded(wanted.detach())
        except ValueError:
            break
        error = expected(wanted + (stored - wanted).detach())  # the gradient passes by the rounding
        if float(error) < least:
            best, least = stored, float(error)
        optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
        optimizer.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return best


class _ExpectedError:
    """The closed form ``E`` of the module's docstring as a function of the scales."""

    def __init__(self, weight: Tensor, grid: Grid, maxima: Tensor, sample: Tensor, importance: Tensor, inputs: str) -> None:
        self._grid, self._inputs = grid, inputs
        self._columns = weight.square().sum(0)
        rows = weight[:: max(1, len(weight) // _ROWS)]
        self._rows, self._share = rows, len(weight) / len(rows)
        self._energies = importance @ sample.square()
        # One range for all tokens is that of the largest: one row of the largest magnitudes stands for all.
        self._tokens = sample.abs() if inputs == "dynamic" else maxima[None]
        self._importance = importance if inputs == "dynamic" else importance.sum()[None]

    def __call__(self, scales: Tensor) -> Tensor:
        groups = grouped(self._rows * scales, self._grid)
        reach = 2 * groups.abs().amax(-1) if self._grid.symmetric else groups.amax(-1) - groups.amin(-1)
        steps = (reach / (2**self._grid.bits - 1)).square().sum(0) * self._share  # of each group of columns
        energies = grouped((self._energies / scales.square())[None], self._grid).sum(-1)[0]
        error = (steps * energies).sum()
        if self._inputs != "none":
            tokens = self._importance @ ((self._tokens / scales).amax(1) / 127.5).square()
            error = error + tokens * (self._columns * scales.square()).sum()
        expected: Tensor = error / 12
        return expected
