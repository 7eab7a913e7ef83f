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

Load = Callable[[int], Tensor]  # batch number -> hidden states [batch, tokens, hidden]
Store = Callable[[int, Tensor], None]
TILE = 512  # columns of a tile of the Hessian's upper triangle


class Statistics:
    """What a solver learns about the inputs ``x`` of a group of layers; everything is accumulated in float32.

    The Hessian ``H = 2/n * sum(x x^T)`` (GPTQ, arXiv:2210.17323, section 3.1) and, where reference inputs are given, the drift
    ``D = 2/n * sum((x_ref - x) x^T)``.

    Attributes:
        count: the number ``n`` of inputs so far. An expert's layers see only the tokens routed to it, perhaps none.
    """

    def __init__(self) -> None:
        self.count = 0
        self._hessian: Tensor | None = None
        self._drift: Tensor | None = None

    def add(self, inputs: Tensor, reference: Tensor | None = None) -> None:
        """Add inputs ``[..., in_features]``, each leading index one sample, and the unquantized model's at the same places."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        columns = rows.shape[1]
        if self._hessian is None:
            self._hessian = torch.zeros(columns, columns, device=rows.device)
        # A symmetric rank-k update: only tiles on and above the diagonal are computed, each by the matrix product routine.
        for start in range(0, columns, TILE):
            stop = min(start + TILE, columns)
            self._hessian[start:stop, start:].addmm_(rows[:, start:stop].t(), rows[:, start:])
        if reference is not None:
            if self._drift is None:
                self._drift = torch.zeros(columns, columns, device=rows.device)
            self._drift.addmm_((reference.reshape(-1, columns).float() - rows).t(), rows)
        self.count += rows.shape[0]

    def hessian(self) -> Tensor:
        """The Hessian, float32 ``[in_features, in_features]``."""
        if self._hessian is None or not self.count:
            raise ValueError("no inputs were added")
        upper = self._hessian.triu()
        return (upper + upper.triu(1).t()).mul_(2.0 / self.count)

    def drift(self) -> Tensor | None:
        """The drift, float32 ``[in_features, in_features]``; None where no reference inputs were added."""
        return None if self._drift is None else self._drift * (2.0 / self.count)


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
            statistics = Statistics()
            here = [batch for batch, stop in enumerate(waiting) if stop is not None and stop[0] == number]
            # In order of batches and not of arrival: a batch that misses a group comes early to the next, and rounding
            # depends on the order of a sum.
            for batch in here:
                statistics.add(waiting[batch][1], expected[batch][1] if twins and number in common else None)
            solve(group, statistics)
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
) -> None:
    """As :func:`suspended_forward`, by running the block from its start up to each group, then once to its end."""
    for group in groups:
        for names, statistics in _collect([group], batches, arguments, quantized, reference, stop=True):
            solve(names, statistics)
    _finish(batches, arguments, quantized, reference)


@torch.no_grad()
def parallel_forward(
    groups: Sequence[list[str]],
    batches: int,
    arguments: Arguments,
    quantized: Stream,
    reference: Stream | None,
    solve: Solve,
) -> None:
    """``true_sequential=false``: all statistics come from the unquantized block, in one pass; a second gives the output."""
    for names, statistics in _collect(groups, batches, arguments, quantized, reference, stop=False):
        solve(names, statistics)
    _finish(batches, arguments, quantized, reference)


def _collect(
    groups: Sequence[list[str]],
    batches: int,
    arguments: Arguments,
    quantized: Stream,
    reference: Stream | None,
    stop: bool,
) -> list[tuple[list[str], Statistics]]:
    statistics = [Statistics() for _ in groups]
    for batch in range(batches):
        inputs = _inputs(groups, range(len(groups)), arguments, quantized, batch, stop)
        common = [number for number in inputs if not routed(groups[number])]
        expected = _inputs(groups, common, arguments, reference, batch, stop) if reference and common else {}
        for number, rows in inputs.items():
            statistics[number].add(rows, expected.get(number))
    return list(zip(groups, statistics, strict=True))


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
