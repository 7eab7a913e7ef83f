"""What a layer's quantized weight does to the model's predictions: swapped into the unquantized model, all else as it was.

The unquantized model runs once and what enters each of its blocks is kept. A trial goes on from the first block that it
changes, and many trials pass a block while its weights are in memory. The Kullback-Leibler divergence of the predictions
(nats a token) is taken over the whole vocabulary, a few tokens at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantize.blocks import DecoderWalk, linear_layers, linear_weight, set_linear_weight
from quantize.forwards import run_block

_CHUNK = 128  # tokens whose logits are in memory at once
_BATCH = 2048  # tokens in one forward of a block
_LARGEST = 80.0  # of log q - log p: its exponential is finite in float32


@dataclass(frozen=True)
class Swap:
    """What takes a linear layer's place.

    Attributes:
        weight: floating ``[out_features, in_features]``.
        inputs: what the layer does to its inputs first (rounding them to 8 bits); None: nothing.
    """

    weight: Tensor
    inputs: Callable[[Tensor], Tensor] | None = None


@dataclass
class OutputError:
    """Sums over tokens and outputs: ``signal`` of squared outputs, ``noise`` of their squared errors. No tokens: zeros."""

    signal: float = 0.0
    noise: float = 0.0


Trial = Mapping[str, Swap]  # by the layers' full names


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """``sum p (log p - log q)`` of each row, from log-probabilities ``log p`` and ``log q`` ``[rows, vocabulary]``.

    Summed as ``p (exp(d) - 1 - d)`` with ``d = log q - log p``, which is the same because probabilities sum to 1: no term is
    negative, so small divergences are not lost in the rounding of large terms of either sign.
    """
    distance = (other - reference).clamp_(max=_LARGEST)
    return (torch.expm1(distance) - distance).mul_(reference.exp()).sum(-1)


class SwapBench:
    """An unquantized model on some windows, into which layers are swapped.

    Attributes:
        walk: the model.
        arguments: the other arguments of each block.
        states: what enters each block, and last what leaves the last: ``[windows, tokens, hidden]`` each.
    """

    def __init__(self, walk: DecoderWalk, windows: Tensor) -> None:
        """Run the model once on ``windows``, int64 ``[windows, tokens]``."""
        self.walk = walk
        self.arguments = walk.block_arguments(windows.shape[1])
        self.states = [torch.cat([walk.block_inputs(batch) for batch in self._batches(windows)])]
        for index in range(walk.count):
            with walk.loaded_block(index) as block:
                self.states.append(self.through(index, block, self.states[-1]))

    @staticmethod
    def _batches(windows: Tensor) -> Sequence[Tensor]:
        return torch.split(windows, max(1, _BATCH // windows.shape[1]))

    @torch.no_grad()
    def through(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """What leaves block ``index`` when ``hidden`` ``[windows, tokens, hidden]`` enters."""
        return torch.cat([run_block(block, batch, self.arguments[index]) for batch in self._batches(hidden)])

    def block_of(self, layer: str) -> int:
        """The number of the block a layer lies in."""
        return int(layer.removeprefix(f"{self.walk.path}.").partition(".")[0])

    def divergences(self, trials: Mapping[str, Trial]) -> dict[str, float]:
        """Mean divergence of the model with a trial's layers swapped in from the model as it is, for each trial.

        All trials' hidden states are held at once; give them a few at a time.
        """
        starts = {label: min(map(self.block_of, trial)) for label, trial in trials.items()}
        streams: dict[str, Tensor] = {}
        for index in range(min(starts.values(), default=self.walk.count), self.walk.count):
            streams |= {label: self.states[index] for label, start in starts.items() if start == index}
            with self.walk.loaded_block(index) as block:
                prefix = f"{self.walk.path}.{index}."
                for label, hidden in streams.items():
                    own = {name.removeprefix(prefix): swap for name, swap in trials[label].items() if name.startswith(prefix)}
                    with swapped(block, own):
                        streams[label] = self.through(index, block, hidden)
        return self.compare(streams)

    @torch.no_grad()
    def compare(self, streams: Mapping[str, Tensor], walk: DecoderWalk | None = None) -> dict[str, float]:
        """Mean divergence of the predictions from hidden states behind the last block, ``[windows, tokens, hidden]`` each.

        Args:
            streams: hidden states, by label.
            walk: whose final norm and output embedding read them; None: the unquantized model's.
        """
        totals = dict.fromkeys(streams, 0.0)
        tokens = self.states[-1].shape[0] * self.states[-1].shape[1]
        with self.walk.logits() as logits, walk.logits() if walk else contextlib.nullcontext(logits) as others:
            for window, start in self._chunks():
                rows = (slice(window, window + 1), slice(start, start + _CHUNK))
                reference = torch.log_softmax(logits(self.states[-1][rows])[0].float(), -1)
                for label, hidden in streams.items():
                    other = torch.log_softmax(others(hidden[rows])[0].float(), -1)
                    totals[label] += float(kl_divergence(reference, other).double().sum())
        return {label: total / tokens for label, total in totals.items()}

    def _chunks(self) -> Iterator[tuple[int, int]]:
        windows, tokens = self.states[-1].shape[:2]
        return ((window, start) for window in range(windows) for start in range(0, tokens, _CHUNK))

    @torch.no_grad()
    def output_errors(self, index: int, trial: Trial) -> dict[str, OutputError]:
        """How far outputs of layers of block ``index`` move when they are swapped, on the unquantized model's own inputs."""
        prefix = f"{self.walk.path}.{index}."
        errors = {name: OutputError() for name in trial}

        def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                swap, inputs = trial[name], args[0].float()
                rounded = inputs if swap.inputs is None else swap.inputs(inputs)
                change = rounded @ swap.weight.to(inputs.device).t() - inputs @ linear_weight(layer).float().t()
                errors[name].signal += float(output.double().square().sum())
                errors[name].noise += float(change.double().square().sum())

            return hook

        with self.walk.loaded_block(index) as block:
            layers = linear_layers(block)
            handles = [layers[name.removeprefix(prefix)].register_forward_hook(compare(name)) for name in trial]
            try:
                self.through(index, block, self.states[index])
            finally:
                for handle in handles:
                    handle.remove()
        return errors


@contextlib.contextmanager
def swapped(block: nn.Module, swaps: Mapping[str, Swap]) -> Iterator[None]:
    """The block with layers (by their names inside it) replaced; put back afterwards."""
    layers = linear_layers(block)
    before = {name: layers[name]._parameters["weight"] for name in swaps}
    handles = []
    for name, swap in swaps.items():
        set_linear_weight(layers[name], swap.weight)
        if swap.inputs is not None:
            handles.append(layers[name].register_forward_pre_hook(_on_inputs(swap.inputs)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in before.items():
            layers[name]._parameters["weight"] = weight


def _on_inputs(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, args: (change(args[0]), *args[1:])
