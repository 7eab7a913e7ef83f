"""Scaling a layer's input channels without changing what the block computes.

Dividing a norm's weight (and bias) by ``s`` and multiplying the columns of every layer that reads the norm by ``s`` leaves
the block's function as it is and moves the difficulty of quantization between inputs and weights (SmoothQuant, Xiao et al.
2023, arXiv:2211.10438, section 4; AWQ, Lin et al. 2024, arXiv:2306.00978, section 3.2).

Which norm a group of layers reads is observed, not listed: its output is the very tensor that the layers receive. Whether
scaling it is really without consequence (nothing else reads it; the weight multiplies as it is or, as in Gemma, one more than
it is) is tried out before it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.blocks import Arguments, linear_layers, linear_weight, set_linear_weight
from quantize.forwards import run_block

_OFFSETS = (0.0, 1.0)  # the norm multiplies by weight + offset
_TOLERANCE = 0.02  # of a block's change of its input, relative; a wrong fold is off by tens of percent


@dataclass(frozen=True)
class Norm:
    """A norm whose output goes to one group of linear layers and nowhere else.

    Attributes:
        name: its name inside the block.
        weight: float32 ``[features]``.
        bias: float32 ``[features]``; None where it has none.
        offset: what is added to the weight before it multiplies: 0, or 1 (Gemma).
        dtype: the type its parameters are stored in.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    offset: float
    dtype: torch.dtype

    def fold(self, scales: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Divide the norm's output by ``scales``, float32 ``[features]``, positive.

        Returns:
            The new parameters by name inside the block, in the stored type, and the scales that they amount to after their
            rounding, so that layers scaled by those compensate it.

        Raises:
            ValueError: a parameter leaves the stored type's range.
        """
        old = self.weight + self.offset
        weight = (old / scales - self.offset).to(self.dtype)
        new = weight.float() + self.offset
        scales = torch.where((new != 0) & (old != 0), old / new, scales)
        folded = {f"{self.name}.weight": weight}
        if self.bias is not None:
            folded[f"{self.name}.bias"] = (self.bias / scales).to(self.dtype)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (*folded.values(), scales)) or bool((scales <= 0).any()):
            raise ValueError(f"scales from {float(scales.min()):.3g} to {float(scales.max()):.3g} do not fit {self.dtype}")
        return folded, scales


@torch.no_grad()
def find_norms(
    block: nn.Module,
    groups: Sequence[Sequence[str]],
    hidden: Tensor,
    arguments: Arguments,
    stored_dtype: Callable[[str], torch.dtype],
) -> dict[str, Norm]:
    """The norms that can be scaled, by the name of the first layer of the group that reads each.

    Args:
        block: the decoder block.
        groups: from :func:`quantize.groups.find_groups`.
        hidden: hidden states ``[windows, tokens, hidden]`` to try with; one window will do.
        arguments: the block's other arguments.
        stored_dtype: the type of a parameter in the checkpoint, by name inside the block.
    """
    found = {}
    before = run_block(block, hidden, arguments)
    for group, (name, inputs) in _observe(block, groups, hidden, arguments).items():
        module, layers = block.get_submodule(name), groups[group]
        bias = getattr(module, "bias", None)
        for offset in _OFFSETS:
            norm = Norm(
                name,
                module.get_parameter("weight").float().clone(),
                bias.float().clone() if isinstance(bias, Tensor) else None,
                offset,
                stored_dtype(f"{name}.weight"),
            )
            # Any scales do; these differ from channel to channel and are far from 1.
            scales = torch.where(torch.arange(len(norm.weight), device=hidden.device) % 2 == 0, 0.5, 2.0)
            with _scaled(block, norm, layers, scales):
                close = is_close(module(inputs) * scales, module_output(module, inputs, norm)) and is_close(
                    run_block(block, hidden, arguments) - hidden, before - hidden
                )
            if close:
                found[layers[0]] = norm
                break
    return found


def module_output(module: nn.Module, inputs: Tensor, norm: Norm) -> Tensor:
    """What a norm module gives with its original parameters."""
    parameters = {"weight": norm.weight.to(inputs.dtype)}
    if norm.bias is not None:
        parameters["bias"] = norm.bias.to(inputs.dtype)
    output: Tensor = torch.func.functional_call(module, parameters, (inputs,))
    return output


def _observe(
    block: nn.Module, groups: Sequence[Sequence[str]], hidden: Tensor, arguments: Arguments
) -> dict[int, tuple[str, Tensor]]:
    """For each group whose input is a module's output: that module's name, and the module's own input."""
    outputs: list[tuple[str, Tensor, Tensor]] = []
    found: dict[int, tuple[str, Tensor]] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda _, args, output: outputs.append((name, args[0], output)) if isinstance(output, Tensor) else None

    def look(group: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            for name, inputs, output in outputs:
                # The weight's size tells a norm of the whole input from one of each head.
                if output is args[0] and len(block.get_submodule(name).get_parameter("weight")) == output.shape[-1]:
                    found[group] = (name, inputs)

        return hook

    layers = linear_layers(block)
    handles = [layers[group[0]].register_forward_pre_hook(look(number)) for number, group in enumerate(groups)]
    for name, module in block.named_modules():
        weight = module._parameters.get("weight")
        if name not in layers and weight is not None and weight.dim() == 1:
            handles.append(module.register_forward_hook(remember(name)))
    try:
        run_block(block, hidden, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found


def fold_norm(block: nn.Module, norm: Norm, layers: Sequence[str], scales: Tensor) -> dict[str, Tensor]:
    """Divide a norm's output by ``scales`` and multiply the columns of the layers that read it, in place.

    Args:
        block: the decoder block.
        norm: from :func:`find_norms`.
        layers: names of the layers, inside the block.
        scales: float32 ``[features]``, as :meth:`Norm.fold` gives them back.

    Returns:
        The norm's parameters in their stored type, by name inside the block.
    """
    dense, modules = norm.fold(scales)[0], linear_layers(block)
    for name, tensor in dense.items():
        block.get_parameter(name).data.copy_(tensor)
    for name in layers:
        set_linear_weight(modules[name], linear_weight(modules[name]).float() * scales)
    return dense


@contextmanager
def _scaled(block: nn.Module, norm: Norm, layers: Sequence[str], scales: Tensor) -> Iterator[None]:
    """The block with the norm divided and the layers multiplied by ``scales``; put back afterwards."""
    module, modules = block.get_submodule(norm.name), [linear_layers(block)[name] for name in layers]
    with restored([module, *modules]):
        weight = module.get_parameter("weight")
        weight.data = ((norm.weight + norm.offset) / scales - norm.offset).to(weight.dtype)
        if norm.bias is not None:
            module.get_parameter("bias").data = (norm.bias / scales).to(weight.dtype)
        for layer in modules:
            set_linear_weight(layer, linear_weight(layer) * scales)
        yield


@contextmanager
def restored(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Afterwards modules have the parameters they had, whether those were replaced or got other values."""
    kept = [{name: parameter for name, parameter in module._parameters.items() if parameter is not None} for module in modules]
    data = [{name: parameter.data for name, parameter in own.items()} for own in kept]
    try:
        yield
    finally:
        for module, own, values in zip(modules, kept, data, strict=True):
            module._parameters.update(own)
            for name, parameter in own.items():
                parameter.data = values[name]


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether most tokens agree; outlier tokens must not hide the others' disagreement."""
    difference = (found - expected).float().flatten(0, -2).norm(dim=-1) / expected.float().flatten(0, -2).norm(dim=-1)
    return bool(difference.nan_to_num(0).median() < _TOLERANCE)
