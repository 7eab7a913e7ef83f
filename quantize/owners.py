"""The module that owns a group of layers, and how far its output moves when their weights are replaced.

AWQ judges scales by the output of the attention that owns q, k and v, or of the MLP that owns gate and up (AutoAWQ calls it
``module2inspect``). Which module that is is observed: the outermost one inside the block that is called with the very tensor
the layers receive. Several candidates are evaluated in one call: they ride along as the batch dimension, and each layer
multiplies each candidate's rows by that candidate's weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantize.blocks import Arguments, linear_layers
from quantize.forwards import run_block


@dataclass(frozen=True)
class Owner:
    """A module that is called with the input of a group of layers.

    Attributes:
        module: inside the block.
        layers: the group's linear layers, in order.
        args: what the module is called with; None in the place of the input.
        kwargs: likewise.
    """

    module: nn.Module
    layers: tuple[nn.Module, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @torch.no_grad()
    def error(self, windows: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """Squared error of the module's outputs, summed over windows: float32 ``[candidates]``.

        Args:
            windows: inputs ``[1, tokens, in_features]``, taken one after another: memory is that of one window for each
                candidate.
            weights: ``[candidates, out_features, in_features]`` of each layer.
        """
        candidates = len(weights[0])
        total = torch.zeros(candidates, device=weights[0].device)
        for window in windows:
            expected = self._output(window).float()
            with _stacked(self.layers, weights):
                found = self._output(window.expand(candidates, *window.shape[1:])).float()
            total += (found - expected).square().flatten(1).sum(1)
        return total

    def _output(self, inputs: Tensor) -> Tensor:
        def filled(value: Any) -> Any:
            return inputs if value is _INPUT else value

        output = self.module(*map(filled, self.args), **{key: filled(value) for key, value in self.kwargs.items()})
        result: Tensor = output[0] if isinstance(output, tuple | list) else output
        return result


_INPUT = object()  # stands for the input among a module's arguments


@contextmanager
def _stacked(layers: Sequence[nn.Module], weights: Sequence[Tensor]) -> Iterator[None]:
    """Each layer with as many weights as its input has windows."""

    def forward_of(layer: nn.Module, weight: Tensor) -> Callable[[Tensor], Tensor]:
        transposed = weight.to(layer.get_parameter("weight").dtype).transpose(1, 2)
        bias = getattr(layer, "bias", None)

        def forward(inputs: Tensor) -> Tensor:
            product = torch.bmm(inputs.reshape(len(transposed), -1, inputs.shape[-1]), transposed)
            product = product.view(*inputs.shape[:-1], product.shape[-1])
            return product if bias is None else product + bias

        return forward

    try:
        for layer, weight in zip(layers, weights, strict=True):
            layer.forward = forward_of(layer, weight)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


@torch.no_grad()
def find_owners(block: nn.Module, groups: Sequence[Sequence[str]], hidden: Tensor, arguments: Arguments) -> dict[str, Owner]:
    """The owner of each group that has one, by the name of the group's first layer.

    A layer whose input nothing else is called with (the output and down projections) owns itself and is left out.

    Args:
        block: the decoder block.
        groups: from :func:`quantize.groups.find_groups`.
        hidden: hidden states ``[1, tokens, hidden]``.
        arguments: the block's other arguments.
    """
    layers = linear_layers(block)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    found: dict[str, Owner] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = (args, kwargs)

        return hook

    def look(group: Sequence[str]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            for name, (args, kwargs) in calls.items():
                whole = all(layer.startswith(f"{name}.") for layer in group)
                if whole and any(value is inputs[0] for value in (*args, *kwargs.values())):
                    marked = tuple(_INPUT if value is inputs[0] else value for value in args)
                    named = {key: _INPUT if value is inputs[0] else value for key, value in kwargs.items()}
                    found[group[0]] = Owner(block.get_submodule(name), tuple(layers[layer] for layer in group), marked, named)
                    return

        return hook

    handles = [
        module.register_forward_pre_hook(remember(name), with_kwargs=True)
        for name, module in block.named_modules()
        if name and name not in layers
    ]
    handles += [layers[group[0]].register_forward_pre_hook(look(group)) for group in groups]
    try:
        run_block(block, hidden, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found
