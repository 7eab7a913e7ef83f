"""Which linear layers of a block share an input, found by watching the block run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from quantize.blocks import Arguments, linear_layers
from quantize.forwards import run_block


@torch.no_grad()
def find_groups(block: nn.Module, batches: Iterable[Tensor], arguments: Arguments) -> list[list[str]]:
    """Names of the block's linear layers, grouped by shared input, in an order of execution that holds for every batch.

    One window reaches all layers of a dense block. Experts are reached by the tokens routed to them, so further windows are
    run until every layer has been seen. Layers that no batch reaches are left out.

    Args:
        block: the decoder block.
        batches: hidden states ``[windows, tokens, hidden]``; no more are taken than needed.
        arguments: the block's other arguments.
    """
    layers = list(linear_layers(block))
    groups: list[list[str]] = []
    owner: dict[str, int] = {}
    sequences: list[list[int]] = []
    for hidden in batches:
        for part in (hidden[:1], hidden[1:]):
            if len(part) and len(owner) < len(layers):
                observed = _observe(block, part, arguments)
                for names in observed:
                    # A layer reached for the first time shares no Hessian with one that was reached without it.
                    if fresh := [name for name in names if name not in owner]:
                        owner.update(dict.fromkeys(fresh, len(groups)))
                        groups.append(fresh)
                sequences.append(list(dict.fromkeys(owner[name] for names in observed for name in names)))
        if len(owner) == len(layers):
            break
    return _merge(groups, sequences, layers)


def _observe(block: nn.Module, hidden: Tensor, arguments: Arguments) -> list[list[str]]:
    """The groups of one forward, in its order."""
    groups: list[list[str]] = []
    # Identity of an input is meant while it lives: memory is reused afterwards, but a dead reference equals nothing.
    seen: list[weakref.ref[Tensor]] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if not args[0].numel() or any(name in group for group in groups):
                return
            for group, reference in zip(groups, seen, strict=True):
                if reference() is args[0]:
                    group.append(name)
                    return
            groups.append([name])
            seen.append(weakref.ref(args[0]))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in linear_layers(block).items()]
    try:
        run_block(block, hidden, arguments)
    finally:
        for handle in handles:
            handle.remove()
    return groups


def _merge(groups: list[list[str]], sequences: list[list[int]], layers: list[str]) -> list[list[str]]:
    """All groups in an order that agrees with every observed sequence of group numbers, else in order of definition."""
    position = {name: number for number, name in enumerate(layers)}
    rank = [min(position[name] for name in group) for group in groups]
    sorter: TopologicalSorter[int] = TopologicalSorter(dict.fromkeys(range(len(groups)), ()))
    for sequence in sequences:
        for earlier, later in pairwise(sequence):
            sorter.add(later, earlier)
    try:
        sorter.prepare()
    except CycleError:
        return [groups[number] for number in sorted(range(len(groups)), key=rank.__getitem__)]
    order: list[int] = []
    ready: set[int] = set()
    while sorter.is_active():
        ready.update(sorter.get_ready())
        order.append(min(ready, key=rank.__getitem__))
        ready.remove(order[-1])
        sorter.done(order[-1])
    return [groups[number] for number in order]
