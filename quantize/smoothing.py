"""SmoothQuant: make inputs easier to quantize at the weights' expense (Xiao et al. 2023, arXiv:2211.10438).

A few input channels are a hundred times larger than the rest and take the 8-bit steps of all. Dividing channel ``j`` of the
inputs by ``s_j`` and multiplying the weights' column ``j`` by it changes nothing in exact arithmetic; eq. 4 of the paper::

    s_j = max|X_j| ^ alpha / max|W_j| ^ (1 - alpha)

The paper takes one ``alpha`` for a model. Here it is searched for each norm by what counts, the error of the layers' quantized
outputs on calibration tokens; not smoothing at all is among the candidates, so a norm is never made worse on those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantize.activations import fixed_step, quantize_inputs, token_steps
from quantize.grids import Grid, quantize_nearest
from quantize.solvers.base import SolverOptions

_ALPHAS = tuple(step / 20 for step in range(21))
_SMALLEST = 1e-5

Round = Callable[[Tensor], Tensor]  # scales to what they amount to once the norm is stored


def smoothing_scales(
    weights: Sequence[Tensor], grid: Grid, maxima: Tensor, sample: Tensor, options: SolverOptions, rounded: Round
) -> tuple[Tensor, float | None]:
    """The scales of a group's inputs with the least output error, and their ``alpha`` (None: not to smooth is best).

    Args:
        weights: float32 ``[out_features, in_features]`` of the layers that read the norm.
        grid: the grid of the weights.
        maxima: the largest magnitude of each input channel, float32 ``[in_features]``.
        sample: some of the inputs, float32 ``[rows, in_features]``.
        options: ``smoothquant_alpha`` (None searches), and how inputs are quantized.
        rounded: gives the scales that remain after the norm's parameters are rounded; may raise ValueError where they do not
            fit, and that candidate is then left out.

    Returns:
        float32 ``[in_features]``, positive, and alpha.
    """
    weight = torch.cat([w.float() for w in weights])
    columns = weight.abs().amax(0)
    target = sample @ weight.t()
    best, least, chosen = torch.ones_like(maxima), float("inf"), None
    candidates: list[float | None] = [None, *_ALPHAS] if options.smoothquant_alpha is None else [options.smoothquant_alpha]
    for alpha in candidates:
        try:
            scales = best if alpha is None else rounded(_scales(maxima, columns, alpha))
        except ValueError:
            continue
        inputs, quantized = sample / scales, quantize_nearest(weight * scales, grid).dequantize()
        if options.input_activations == "dynamic":
            inputs = quantize_inputs(inputs, token_steps(inputs))
        elif options.input_activations == "static":
            inputs = quantize_inputs(inputs, fixed_step(maxima / scales, inputs, options.observer, options.percentile))
        error = float((inputs @ quantized.t() - target).square().sum())
        if error < least:
            best, least, chosen = scales, error, alpha
    return best, chosen


def _scales(maxima: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """Equation 4, with a geometric middle of 1: a common factor changes nothing but the norm's range."""
    scales = maxima.clamp(min=_SMALLEST) ** alpha / columns.clamp(min=_SMALLEST) ** (1 - alpha)
    # A channel that is always zero needs no scale.
    scales = torch.where(maxima > 0, scales, torch.ones_like(scales))
    return scales / (scales.max() * scales.min()).sqrt()
