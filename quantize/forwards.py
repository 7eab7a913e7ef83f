"""Running a decoder block while its linear layers are being quantized.

True sequential order means: the inputs of each group of layers come from a block whose earlier groups are quantized
already. The plain way runs the block again from its start for every group (:func:`rerun_forward`; about 2.2 forwards' work
in a Llama block). :func:`suspended_forward` runs it once: every batch of the calibration set is a greenlet that stops in
front of a group's first layer; when all have stopped, the group's statistics are complete, the group is quantized, and all go
on with the new weights. Only tensors alive at the stop are kept (the residual stream and one intermediate result).

Both feed the solver the same inputs in the same order and give the same result; the second needs less time, the first
less memory, so the first serves when activations spill to disk.

A solver that wants to know how far the inputs have drifted from those of the unquantized model gets a :class:`Stream` of
the latter: the same block with its own weights on its own hidden states, kept in step with the block being quantized.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from quantize.blocks import Arguments, linear_layers
from quantize.statistics import Statistics

Load = Callable[[int], Tensor]  # batch number -> hidden states [batch, tokens, hidden]
Store = Callable[[int, Tensor], None]
MakeStatistics = Callable[[], Statistics]
Solve = Callable[[list[str], Statistics], None]  # (layers of one group, their inputs): replaces the layers' weights


@dataclass(frozen=True)
class Stream:
    """Hidden states on their way through a block.

    Attributes:
        block: the decoder block.
        load: gives a batch's hidden states.
        store: takes a batch's output hidden states.
    """

    block: nn.Module
    load: Load
    store: Store


class _Stop(Exception):
    """Ends a forward early: the inputs it was run for have been seen."""


def run_block(block: Callable[..., Any], hidden: Tensor, arguments: Arguments) -> Tensor:
    """One forward of a decoder block: hidden states in, hidden states out, both ``[batch, tokens, hidden]``."""
    args, kwargs = arguments
    if isinstance(kwargs.get("alibi"), Tensor) and kwargs["alibi"].dim() == 3:
        # Bloom folds the batch into the first dimension, [batch * heads, 1, tokens]; the arguments are those of one window.
        kwargs = {**kwargs, "alibi": kwargs["alibi"].repeat(hidden.shape[0], 1, 1)}
    output = block(hidden, *args, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple | list) else output
    return result


@torch.no_grad()
def suspended_forward(
    groups: Sequence[list[str]],
    batches: int,
    arguments: Arguments,
    quantized: Stream,
    reference: Stream | None,
    solve: Solve,
    statistics: MakeStatistics = Statistics,
) -> None:
    """Quantize a block group by group in a single forward of every batch.

    Args:
        groups: from :func:`quantize.groups.find_groups`.
        batches: number of batches.
        arguments: the block's other arguments.
        quantized: the block whose weights ``solve`` replaces, and its hidden states.
        reference: the same block unquantized on the unquantized model's hidden states; None: no drift is collected.
        solve: called once for each group, in order, with complete statistics; their ``count`` is 0 where no token of any
            batch reached the group.
        statistics: makes what a group's inputs are added to.
    """
    solved: set[int] = set()
    common = [number for number, group in enumerate(groups) if not routed(group)]
    with (
        _workers(groups, range(len(groups)), batches, arguments, quantized, solved) as workers,
        _workers(groups, common, batches, arguments, reference, solved) as twins,
    ):
        waiting = [worker.switch() for worker in workers]
        expected = [twin.switch() for twin in twins]
        for number, group in enumerate(groups):
            collected = statistics()
            here = [batch for batch, stop in enumerate(waiting) if stop is not None and stop[0] == number]
            # In order of batches and not of arrival: a batch that misses a group comes early to the next, and rounding
            # depends on the order of a sum.
            for batch in here:
                collected.add(waiting[batch][1], expected[batch][1] if twins and number in common else None)
            solve(group, collected)
            solved.add(number)
            for batch in here:
                waiting[batch] = None  # lets go of the input before the worker goes on
                waiting[batch] = workers[batch].switch()
            for batch, stop in enumerate(expected):
                if stop is not None and stop[0] == number:
                    expected[batch] = None
                    expected[batch] = twins[batch].switch()


def routed(group: Sequence[str]) -> bool:
    """Whether only some tokens reach a group, those that a router sends to this expert.

    The unquantized model may send others, so their inputs cannot be compared.
    """
    return bool(re.search(r"\bexperts\.\d+\.", group[0]))


@contextlib.contextmanager
def _workers(
    groups: Sequence[list[str]],
    numbers: Iterable[int],
    batches: int,
    arguments: Arguments,
    stream: Stream | None,
    solved: Container[int],
) -> Iterator[list[greenlet]]:
    """One greenlet a batch, which at every switch runs on to the next of the groups ``numbers`` that is not solved.

    A switch gives ``(group number, inputs)``, or None when the forward is through.
    """
    if stream is None:
        yield []
        return
    hub = getcurrent()

    def stop_at(number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if number not in solved:
                hub.switch((number, args[0]))

        return hook

    layers = linear_layers(stream.block)
    handles = [layers[groups[i][0]].register_forward_pre_hook(stop_at(i)) for i in numbers]
    try:
        yield [greenlet(functools.partial(_forward, stream, arguments, batch)) for batch in range(batches)]
    finally:
        for handle in handles:
            handle.remove()


def _forward(stream: Stream, arguments: Arguments, batch: int) -> None:
    stream.store(batch, run_block(stream.block, stream.load(batch), arguments))


@torch.no_grad()
def rerun_forward(
    groups: Sequence[list[str]],
    batches: int,
    arguments: Arguments,
    quantized: Stream,
    reference: Stream | None,
    solve: Solve,
    statistics: MakeStatistics = Statistics,
) -> None:
    """As :func:`suspended_forward`, by running the block from its start up to each group, then once to its end."""
    for group in groups:
        for names, collected in _collect([group], batches, arguments, quantized, reference, statistics, stop=True):
            solve(names, collected)
    _finish(batches, arguments, quantized, reference)


@torch.no_grad()
def parallel_forward(
    groups: Sequence[list[str]],
    batches: int,
    arguments: Arguments,
    quantized: Stream,
    reference: Stream | None,
    solve: Solve,
    statistics: MakeStatistics = Statistics,
) -> None:
    """``true_sequential=false``: all statistics come from the unquantized block, in one pass; a second gives the output."""
    for names, collected in _collect(groups, batches, arguments, quantized, reference, statistics, stop=False):
        solve(names, collected)
    _finish(batches, arguments, quantized, reference)


def _collect(
    groups: Sequence[list[str]],
    batches: int,
    arguments: Arguments,
    quantized: Stream,
    reference: Stream | None,
    statistics: MakeStatistics,
    stop: bool,
) -> list[tuple[list[str], Statistics]]:
    collected = [statistics() for _ in groups]
    for batch in range(batches):
        inputs = _inputs(groups, range(len(groups)), arguments, quantized, batch, stop)
        common = [number for number in inputs if not routed(groups[number])]
        expected = _inputs(groups, common, arguments, reference, batch, stop) if reference and common else {}
        for number, rows in inputs.items():
            collected[number].add(rows, expected.get(number))
    return list(zip(groups, collected, strict=True))


def _inputs(
    groups: Sequence[list[str]], numbers: Iterable[int], arguments: Arguments, stream: Stream, batch: int, stop: bool
) -> dict[int, Tensor]:
    """What one batch feeds into each of the groups ``numbers`` it reaches; ``stop`` ends the forward at the first."""
    seen: dict[int, Tensor] = {}

    def watch(number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen[number] = args[0]
            if stop:
                raise _Stop

        return hook

    layers = linear_layers(stream.block)
    handles = [layers[groups[i][0]].register_forward_pre_hook(watch(i)) for i in numbers]
    try:
        run_block(stream.block, stream.load(batch), arguments)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _finish(batches: int, arguments: Arguments, *streams: Stream | None) -> None:
    for stream in filter(None, streams):
        for batch in range(batches):
            _forward(stream, arguments, batch)
