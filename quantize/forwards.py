"""Running a decoder block while its linear layers are being quantized.

True sequential order means: the inputs of each group of layers come from a block whose earlier groups are quantized
already. The plain way runs the block again from its start for every group (:func:`rerun_forward`; about 2.2 forwards' work
in a Llama block). :func:`suspended_forward` runs it once: every batch of the calibration set is a greenlet that stops in
front of a group's first layer; when all have stopped, the group's Hessian is complete, the group is quantized, and all go
on with the new weights. Only tensors alive at the stop are kept (the residual stream and one intermediate result).

Both feed the solver the same inputs in the same order and give the same result; the second needs less time, the first
less memory, so the first serves when activations spill to disk.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from quantize.blocks import Arguments, linear_layers

Load = Callable[[int], Tensor]  # batch number -> hidden states [batch, tokens, hidden]
Store = Callable[[int, Tensor], None]


class Hessian:
    """Accumulates ``H = 2/n * sum(x x^T)`` over input rows ``x`` in float32 (GPTQ, arXiv:2210.17323, section 3.1).

    Attributes:
        count: number of rows added. An expert's layers see only the tokens routed to it, perhaps none.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self.count = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs ``[..., in_features]``; each leading index is one sample."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if self._sum is None:
            self._sum = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        self._sum.addmm_(rows.t(), rows)
        self.count += rows.shape[0]

    def value(self) -> Tensor:
        """The Hessian, float32 ``[in_features, in_features]``."""
        if self._sum is None or not self.count:
            raise ValueError("no inputs were added")
        return self._sum * (2.0 / self.count)


Solve = Callable[[list[str], Hessian], None]  # (layers of one group, sum over their inputs): replaces the layers' weights


class _Stop(Exception):
    """Ends a forward early: the inputs it was run for have been seen."""


def run_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """One forward of a decoder block: hidden states in, hidden states out, both ``[batch, tokens, hidden]``."""
    args, kwargs = arguments
    if isinstance(kwargs.get("alibi"), Tensor) and kwargs["alibi"].dim() == 3:
        # Bloom folds the batch into the first dimension, [batch * heads, 1, tokens]; the arguments are those of one window.
        kwargs = {**kwargs, "alibi": kwargs["alibi"].repeat(hidden.shape[0], 1, 1)}
    output = block(hidden, *args, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple | list) else output
    return result


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


@torch.no_grad()
def suspended_forward(
    block: nn.Module,
    groups: Sequence[list[str]],
    batches: int,
    load: Load,
    store: Store,
    arguments: Arguments,
    solve: Solve,
) -> None:
    """Quantize ``block`` group by group in a single forward of every batch.

    Args:
        block: the decoder block; ``solve`` replaces its layers' weights.
        groups: from :func:`find_groups`.
        batches: number of batches.
        load: gives a batch's hidden states.
        store: takes a batch's output hidden states.
        arguments: the block's other arguments.
        solve: called once for each group, in order, with complete statistics; their ``count`` is 0 where no token of any
            batch reached the group.
    """
    hub = getcurrent()
    solved: set[int] = set()

    def stop_at(number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if number not in solved:
                hub.switch((number, args[0]))

        return hook

    layers = linear_layers(block)
    handles = [layers[group[0]].register_forward_pre_hook(stop_at(i)) for i, group in enumerate(groups)]
    workers = [greenlet(lambda i: store(i, run_block(block, load(i), arguments))) for _ in range(batches)]
    try:
        # A switch returns the group the worker stopped at and what it stopped with, or None when its forward is through.
        waiting: list[tuple[int, Tensor] | None] = [worker.switch(i) for i, worker in enumerate(workers)]
        for number, group in enumerate(groups):
            here = [batch for batch, stop in enumerate(waiting) if stop is not None and stop[0] == number]
            solve(group, _sum_up(waiting[batch] for batch in here))
            solved.add(number)
            for batch in here:
                waiting[batch] = None  # lets go of the input before the worker goes on
                waiting[batch] = workers[batch].switch()
    finally:
        for handle in handles:
            handle.remove()


def _sum_up(stops: Iterable[tuple[int, Tensor] | None]) -> Hessian:
    # In order of batches and not of arrival: a batch that misses a group comes early to the next, and rounding depends on
    # the order of a sum.
    hessian = Hessian()
    for stop in stops:
        if stop is not None:
            hessian.add(stop[1])
    return hessian


@torch.no_grad()
def rerun_forward(
    block: nn.Module,
    groups: Sequence[list[str]],
    batches: int,
    load: Load,
    store: Store,
    arguments: Arguments,
    solve: Solve,
) -> None:
    """As :func:`suspended_forward`, by running the block from its start up to each group, then once to its end."""
    for group in groups:
        for names, hessian in _collect(block, [group], batches, load, arguments, stop=True):
            solve(names, hessian)
    _finish(block, batches, load, store, arguments)


@torch.no_grad()
def parallel_forward(
    block: nn.Module,
    groups: Sequence[list[str]],
    batches: int,
    load: Load,
    store: Store,
    arguments: Arguments,
    solve: Solve,
) -> None:
    """``true_sequential=false``: all statistics come from the unquantized block, in one pass; a second gives the output."""
    for names, hessian in _collect(block, groups, batches, load, arguments, stop=False):
        solve(names, hessian)
    _finish(block, batches, load, store, arguments)


def _collect(
    block: nn.Module, groups: Sequence[list[str]], batches: int, load: Load, arguments: Arguments, stop: bool
) -> list[tuple[list[str], Hessian]]:
    hessians = [Hessian() for _ in groups]

    def watch(hessian: Hessian) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            hessian.add(args[0])
            if stop:
                raise _Stop

        return hook

    layers = linear_layers(block)
    handles = [
        layers[group[0]].register_forward_pre_hook(watch(hessian)) for group, hessian in zip(groups, hessians, strict=True)
    ]
    try:
        for i in range(batches):
            try:
                run_block(block, load(i), arguments)
            except _Stop:
                continue
    finally:
        for handle in handles:
            handle.remove()
    return list(zip(groups, hessians, strict=True))


def _finish(block: nn.Module, batches: int, load: Load, store: Store, arguments: Arguments) -> None:
    for i in range(batches):
        store(i, run_block(block, load(i), arguments))
