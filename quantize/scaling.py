"""Scaling the channels of a block's layers before it is quantized.

Scales are chosen by the inputs that the layers have in the block as it still is, on some windows of the quantized model's
hidden states, and folded at once: into the norm in front of the layers (:mod:`quantize.folding`) or into the rows of an earlier
linear layer (:mod:`quantize.linear_folding`). From then on the block is the one that is stored, with other weights and the same
outputs. All are judged by the layers' outputs as they were, so none depends on another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantize.blocks import Arguments, linear_layers, linear_shape
from quantize.folding import Norm, find_norms, fold_norm
from quantize.forwards import run_block
from quantize.group_solver import GroupSolver
from quantize.linear_folding import Link, find_links, row_factors, scale_layers
from quantize.owners import find_owners
from quantize.statistics import Statistics

_WINDOWS = 16  # calibration windows by which scales are chosen


@dataclass
class Scaling:
    """What was done to one block; names are those inside the block.

    Attributes:
        rows: factors of layers' rows, ``[out_features]``.
        columns: factors of layers' columns, ``[in_features]``.
        dense: norms' parameters and layers' biases that were scaled, in their stored types.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """A layer's weight ``[out_features, in_features]`` as it is to be quantized."""
        if name in self.rows:
            weight = weight * self.rows[name][:, None]
        return weight * self.columns[name] if name in self.columns else weight


@torch.no_grad()
def scale_block(
    block: nn.Module,
    prefix: str,
    arguments: Arguments,
    solver: GroupSolver,
    stored_dtype: Callable[[str], torch.dtype],
    observed: Sequence[list[str]],
    wanted: Sequence[list[str]],
    batches: Callable[[int], Iterable[Tensor]],
) -> Scaling:
    """Choose scales for the layers that may be scaled, and fold them into the block.

    Args:
        block: the decoder block.
        prefix: of the block's names.
        arguments: the block's other arguments.
        solver: of the variant.
        stored_dtype: the type of a parameter in the checkpoint, by name inside the block.
        observed: from :func:`quantize.groups.find_groups`.
        wanted: the same groups without layers that stay dense. Only layers that are all wanted can be scaled.
        batches: gives hidden states ``[windows, tokens, hidden]`` of about as many windows as asked for.
    """
    scaling = Scaling()
    if not solver.scales:
        return scaling
    window = next(iter(batches(1)))[:1]
    groups = {group[0]: group for group in wanted if group in observed}
    norms = find_norms(block, list(groups.values()), window, arguments, stored_dtype)
    names = {name for group in wanted for name in group}
    links = [link for link in find_links(block, observed, window, arguments) if {link.source, link.target} <= names]
    owners = find_owners(block, list(groups.values()), window, arguments) if solver.judges_modules else {}
    statistics = _inputs(block, [*norms, *(link.target for link in links)], arguments, solver, batches)

    def full(group: Sequence[str]) -> list[str]:
        return [prefix + name for name in group]

    def stored_in(norm: Norm) -> Callable[[Tensor], Tensor]:
        return lambda scales: norm.fold(scales)[1]

    # All are chosen before any is folded: each is judged by outputs and weights as they were.
    of_norms = {
        name: solver.find_scales(full(groups[name]), statistics[name], stored_in(norm), owners.get(name))
        for name, norm in norms.items()
    }
    of_links = [solver.find_scales([prefix + link.target], statistics[link.target], link.shared) for link in links]
    for (name, scales), norm in zip(of_norms.items(), norms.values(), strict=True):
        if scales is not None:
            scaling.dense |= fold_norm(block, norm, groups[name], scales)
            scaling.columns |= dict.fromkeys(groups[name], scales)
    for link, scales in zip(links, of_links, strict=True):
        if scales is not None:
            _fold_link(block, link, scales, scaling, stored_dtype)
    return scaling


def _fold_link(
    block: nn.Module, link: Link, scales: Tensor, scaling: Scaling, stored_dtype: Callable[[str], torch.dtype]
) -> None:
    scale_layers(block, link, scales)
    source = linear_layers(block)[link.source]
    scaling.rows[link.source] = row_factors(link, scales, linear_shape(source)[0])
    scaling.columns[link.target] = scales
    if getattr(source, "bias", None) is not None:
        bias, name = source.get_parameter("bias"), f"{link.source}.bias"
        scaling.dense[name] = bias.to(stored_dtype(name))
        bias.data = scaling.dense[name].to(bias.dtype)


def _inputs(
    block: nn.Module,
    names: Sequence[str],
    arguments: Arguments,
    solver: GroupSolver,
    batches: Callable[[int], Iterable[Tensor]],
) -> dict[str, Statistics]:
    """Statistics of the inputs of some layers in the block as it is."""
    found = {name: solver.scale_statistics() for name in names}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: found[name].add(args[0])

    layers = linear_layers(block)
    handles = [layers[name].register_forward_pre_hook(watch(name)) for name in names]
    try:
        for hidden in batches(_WINDOWS):
            run_block(block, hidden, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return found
