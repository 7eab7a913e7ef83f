"""Quantized inputs of linear layers: symmetric 8-bit codes, one step for each token or one for all.

``dynamic`` finds a token's step at run time from its largest magnitude; ``static`` uses one step for the whole layer, found
beforehand on calibration tokens by an observer. Static costs nothing at run time and pays in accuracy: one outlier in one
channel sets the step for every token (Xiao et al. 2023, arXiv:2211.10438, table 3), and a value beyond the range is clipped.

A step is ``reach / 127.5``, as the compressed-tensors package has it: the 255 steps from -128 to 127 cover ``[-reach, reach]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 255
_SHRINKAGES = torch.linspace(0.2, 1.0, 81)


def quantize_inputs(inputs: Tensor, step: Tensor) -> Tensor:
    """The values that quantized inputs stand for: ``clamp(round(x / step), -128, 127) * step``; shapes broadcast."""
    return torch.clamp(torch.round(inputs / step), -128, 127) * step


def rounded_inputs(inputs: Tensor, step: Tensor) -> Tensor:
    """As :func:`quantize_inputs`, with the gradient of the identity, so that what lies before them can be trained."""
    return inputs + (quantize_inputs(inputs.detach(), step) - inputs).detach()


def token_steps(inputs: Tensor) -> Tensor:
    """The dynamic step of each token: ``[..., in_features]`` to ``[..., 1]``, positive."""
    return _step(inputs.abs().amax(-1, keepdim=True))


def fixed_step(maxima: Tensor, sample: Tensor, observer: str, percentile: float = 100.0) -> Tensor:
    """The static step of a layer's inputs, float32 ``[1]``, positive.

    Args:
        maxima: the largest magnitude of each column over all calibration tokens, ``[in_features]``.
        sample: some of the inputs, ``[rows, in_features]``.
        observer: ``minmax`` clips nothing that calibration saw; ``percentile`` clips the largest of the sampled magnitudes;
            ``mse`` takes the range with the least squared error on the sample, out of 81 between a fifth of min-max and all.
        percentile: share of the sampled magnitudes, in percent, that ``percentile`` leaves unclipped.

    Raises:
        ValueError: the inputs hold NaN or infinity, or another observer is named.
    """
    reach = maxima.max()
    if not bool(torch.isfinite(reach)):
        raise ValueError("the layer's inputs hold NaN or infinity")
    if observer == "percentile":
        magnitudes = sample.abs().flatten().sort().values
        reach = magnitudes[min(len(magnitudes) - 1, int(len(magnitudes) * percentile / 100))]
    elif observer == "mse":
        errors = [(quantize_inputs(sample, _step(reach * shrink)) - sample).square().mean() for shrink in _SHRINKAGES.tolist()]
        reach = reach * _SHRINKAGES[int(torch.stack(errors).argmin())]
    elif observer != "minmax":
        raise ValueError(f"observer {observer} is unknown")
    return _step(reach).reshape(1)


def _step(reach: Tensor) -> Tensor:
    return (2 * reach / _STEPS).clamp(min=torch.finfo(torch.float32).tiny)
