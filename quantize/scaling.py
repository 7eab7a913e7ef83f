"""Where the inputs of a block's layers may be scaled, found before the block is quantized, and what was scaled by then.

Norms are scaled while their group is solved, for their outputs are what the group sees. Scales between two linear layers
(:mod:`quantize.linear_folding`) are chosen and folded here, before any of the block's layers has codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantize.blocks import Arguments, linear_layers, linear_shape
from quantize.folding import Norm, find_norms
from quantize.forwards import run_block
from quantize.group_solver import GroupSolver
from quantize.linear_folding import find_links, row_factors, scale_layers
from quantize.owners import Owner, find_owners
from quantize.statistics import Statistics

_WINDOWS = 16  # calibration windows by which the scales between two linear layers are chosen


@dataclass
class Scaling:
    """One block's scaling; names are those inside the block.

    Attributes:
        norms: the norm of each group that may be scaled, by the group's first layer.
        owners: the module each group's scales are judged by, likewise.
        rows: factors of layers' rows, ``[out_features]``, applied already.
        columns: factors of layers' columns, ``[in_features]``, applied already.
        dense: biases that have been scaled, in their stored types.
    """

    norms: dict[str, Norm] = field(default_factory=dict)
    owners: dict[str, Owner] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """A layer's weight ``[out_features, in_features]`` as it is to be quantized, before its norm is scaled."""
        if name in self.rows:
            weight = weight * self.rows[name][:, None]
        return weight * self.columns[name] if name in self.columns else weight


class BlockScaler:
    """Finds and applies one block's scaling.

    Args:
        block: the decoder block, whose linear layers are changed where scales are moved between them.
        prefix: of the block's names.
        arguments: the block's other arguments.
        solver: of the variant.
        stored_dtype: the type of a parameter in the checkpoint, by name inside the block.
    """

    def __init__(
        self,
        block: nn.Module,
        prefix: str,
        arguments: Arguments,
        solver: GroupSolver,
        stored_dtype: Callable[[str], torch.dtype],
    ) -> None:
        self.block, self.prefix, self.arguments = block, prefix, arguments
        self.solver, self.stored_dtype = solver, stored_dtype

    @torch.no_grad()
    def prepare(
        self, observed: Sequence[list[str]], wanted: Sequence[list[str]], batches: Callable[[int], Iterable[Tensor]]
    ) -> Scaling:
        """All of it.

        Args:
            observed: from :func:`quantize.groups.find_groups`.
            wanted: the same groups without layers that stay dense. Only layers that are all wanted can be scaled.
            batches: gives hidden states ``[windows, tokens, hidden]`` of about as many windows as asked for.
        """
        scaling = Scaling()
        if not self.solver.scales:
            return scaling
        window = next(iter(batches(1)))[:1]
        whole = [group for group in wanted if group in observed]
        scaling.norms = find_norms(self.block, whole, window, self.arguments, self.stored_dtype)
        if self.solver.moves_scales:
            self._move(scaling, observed, {name for group in wanted for name in group}, window, batches)
        if self.solver.judges_modules:
            owners = find_owners(self.block, whole, window, self.arguments)
            scaling.owners = {name: owner for name, owner in owners.items() if name in scaling.norms}
        return scaling

    def _move(
        self,
        scaling: Scaling,
        observed: Sequence[list[str]],
        wanted: set[str],
        window: Tensor,
        batches: Callable[[int], Iterable[Tensor]],
    ) -> None:
        links = [
            link for link in find_links(self.block, observed, window, self.arguments) if {link.source, link.target} <= wanted
        ]
        if not links:
            return
        statistics = self._inputs([link.target for link in links], batches(_WINDOWS))
        for link in links:
            scales = self.solver.link_scales(self.prefix + link.target, statistics[link.target], link.shared)
            if scales is None:
                continue
            scale_layers(self.block, link, scales)
            source = linear_layers(self.block)[link.source]
            scaling.rows[link.source] = row_factors(link, scales, linear_shape(source)[0])
            scaling.columns[link.target] = scales
            if getattr(source, "bias", None) is not None:
                bias = source.get_parameter("bias")
                name = f"{link.source}.bias"
                scaling.dense[name] = bias.to(self.stored_dtype(name))
                bias.data = scaling.dense[name].to(bias.dtype)

    def _inputs(self, names: Sequence[str], batches: Iterable[Tensor]) -> dict[str, Statistics]:
        """Statistics of the inputs of some layers in the block as it is."""
        found = {name: Statistics(means=True) for name in names}

        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda _, args: found[name].add(args[0])

        layers = linear_layers(self.block)
        handles = [layers[name].register_forward_pre_hook(watch(name)) for name in names]
        try:
            for hidden in batches:
                run_block(self.block, hidden, self.arguments)
        finally:
            for handle in handles:
                handle.remove()
        return found
