"""Block-wise tuning of what quantization leaves continuous: scales, norms and biases.

Codes are decided layer by layer; what a block as a whole puts out is the sum of their errors. Here the codes stay, and all
other numbers of one block are trained for a few passes over the calibration windows, so that the quantized block turns the
hidden states that reach it in the quantized model into those that leave the block in the unquantized one::

    minimise  mean |block(x; scales, norms, biases) - block_ref(x_ref)|^2

That is the second phase of AQLM (Egiazarian et al. 2024, arXiv:2401.06118, section 3.4) on an integer grid, with Adam
(arXiv:1412.6980) and a cosine schedule. The artifact's format does not change: scales are scales, norms are norms.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from quantize.blocks import Arguments
from quantize.forwards import run_block
from quantize.grids import QuantizedTensor

log = logging.getLogger(__name__)

_RATE = 2e-3  # Adam's; scales are trained as factors, so it is relative to the scale
_BETAS = (0.9, 0.95)

Windows = Callable[[list[int]], Tensor]  # numbers of windows -> their hidden states, [windows, tokens, hidden]


@torch.enable_grad()
def tune_block(
    block: nn.Module,
    layers: Mapping[str, QuantizedTensor],
    inputs: Windows,
    targets: Windows,
    windows: int,
    batch: int,
    arguments: Arguments,
    epochs: int,
    seed: int,
    dtypes: Mapping[str, torch.dtype],
) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Train a block's scales, norms and biases; the block's own parameters are set to the result, its layers' weights are not.

    Args:
        block: the decoder block.
        layers: its quantized layers, by name inside the block.
        inputs: hidden states of the windows asked for as they reach the block in the quantized model.
        targets: hidden states of the same windows as they leave the block in the unquantized model.
        windows: number of windows.
        batch: windows in one step.
        arguments: the block's other arguments.
        epochs: passes over all windows.
        seed: of the order of windows.
        dtypes: the type each parameter of the block is stored in, by name inside the block.

    Returns:
        The layers with their new scales, and the changed norms and biases in their stored types, by name inside the block.
    """
    weights = {f"{name}.weight": _Weight(block.get_submodule(name), tensor) for name, tensor in layers.items()}
    shifts = {
        name: parameter.detach().float().clone().requires_grad_()
        for name, parameter in block.named_parameters()
        if parameter.dim() == 1
    }
    optimizer = torch.optim.Adam([weight.factor for weight in weights.values()] + list(shifts.values()), _RATE, _BETAS)
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(windows / batch))
    losses: list[float] = []
    for _ in range(epochs):
        total = 0.0
        for step in torch.split(torch.randperm(windows, generator=generator), batch):
            chosen: list[int] = step.tolist()
            parameters = {name: weight.value() for name, weight in weights.items()}
            parameters |= {name: shift.to(block.get_parameter(name).dtype) for name, shift in shifts.items()}
            loss = (_call(block, parameters, inputs(chosen), arguments).float() - targets(chosen).float()).square().mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
        losses.append(total / windows)
    if not math.isfinite(losses[-1]):
        raise ValueError(f"tuning diverged (loss {losses[-1]}); use solver.tune_epochs=0")
    log.debug("block tuned: loss %s", " -> ".join(f"{loss:.4g}" for loss in losses))
    dense = {name: shift.detach().to(dtypes[name]) for name, shift in shifts.items()}
    for name, tensor in dense.items():
        block.get_parameter(name).data.copy_(tensor)
    return {name: weights[f"{name}.weight"].tensor() for name in layers}, dense


def _call(block: nn.Module, parameters: dict[str, Tensor], hidden: Tensor, arguments: Arguments) -> Tensor:
    return run_block(lambda *args, **kwargs: functional_call(block, parameters, args, kwargs), hidden, arguments)


class _Weight:
    """A quantized layer's weight as a function of one factor for each scale."""

    def __init__(self, module: nn.Module, tensor: QuantizedTensor) -> None:
        self._tensor, self._dtype, self._transposed = tensor, module.get_parameter("weight").dtype, isinstance(module, Conv1D)
        self._columns = tensor.g_idx.long()
        self._scales = tensor.scales.float()
        self._steps = tensor.codes.float() - tensor.zeros.float()[:, self._columns]
        self.factor = torch.ones_like(self._scales).requires_grad_()

    def value(self) -> Tensor:
        """The weight, as the layer holds it."""
        weight = (self._steps * (self._scales * self.factor)[:, self._columns]).to(self._dtype)
        return weight.t() if self._transposed else weight

    def tensor(self) -> QuantizedTensor:
        """The layer with its present scales, rounded as they will be stored."""
        grid = self._tensor.grid
        scales, zeros = grid.settle((self._scales * self.factor).detach(), self._tensor.zeros.float())
        return replace(self._tensor, scales=scales.to(grid.scale_dtype), zeros=zeros.to(grid.zero_dtype))
