"""Quantizing one variant: its decoder blocks one after another, and the output embedding where that is wanted."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from quantize.activations import rounded_inputs, token_steps
from quantize.block_files import BlockFiles, HiddenStates
from quantize.blocks import linear_layers, set_linear_weight
from quantize.config import VariantConfig
from quantize.files import atomic_directory
from quantize.forwards import Stream, parallel_forward, rerun_forward, run_block, suspended_forward
from quantize.grids import QuantizedTensor
from quantize.group_solver import GroupSolver
from quantize.groups import find_groups
from quantize.logs import progress
from quantize.manifest import release_memory
from quantize.run import Run, calibration_windows, needs_calibration, skipped, solver_options
from quantize.scaling import scale_block
from quantize.solvers import SOLVERS, LayerProblem
from quantize.statistics import Statistics
from quantize.tuning import tune_block

log = logging.getLogger(__name__)


def parts_of(run: Run, variant: VariantConfig) -> list[dict[str, tuple[int, int]]]:
    """The linear layers that may be quantized, ``(out_features, in_features)`` by full name, in the parts they are done in.

    One part for each decoder block, and one for the output embedding where ``solver.lm_head`` asks for it.
    """
    parts = [run.walk.layer_names(index) for index in range(run.walk.count)]
    return [*parts, run.walk.head()] if variant.solver.lm_head else parts


def quantize_blocks(run: Run, variant: VariantConfig, files: BlockFiles) -> None:
    """Quantize every part that ``files`` does not have yet."""
    with_hidden = needs_calibration(variant.solver)
    first = files.done(with_hidden)
    if first == 0:
        files.forget_seconds()
    else:
        log.info("going on after block %d of %d", first, files.count)
    step = (_CalibratedSteps if with_hidden else _PlainSteps)(run, variant, files, first)
    for index in progress(range(first, files.count), "quantize", total=files.count, done=first):
        started = time.perf_counter()
        step(index)
        release_memory()
        files.add_seconds(time.perf_counter() - started)


class _PlainSteps:
    """Parts of a solver that needs no data."""

    def __init__(self, run: Run, variant: VariantConfig, files: BlockFiles, first: int) -> None:
        self.run, self.variant, self.files = run, variant, files
        self.options = solver_options(run.config, variant)
        self.parts = parts_of(run, variant)

    def __call__(self, index: int) -> None:
        """Quantize part ``index``."""
        solver, done = SOLVERS[self.variant.solver.name], {}
        for layer in self.parts[index]:
            if not skipped(layer, self.variant.solver.skip):
                weight = self.run.walk.weight(layer)
                problem = LayerProblem([layer], [weight], self.run.grid(self.variant, layer), None, self.options)
                done[layer] = solver.solve(problem)[0]
        self.run.checkpoint.release()
        self.files.write(index, done)


class _CalibratedSteps:
    """Parts of a solver that sees the inputs of each layer, part ``first`` being the next."""

    def __init__(self, run: Run, variant: VariantConfig, files: BlockFiles, first: int) -> None:
        self.walk, self.variant, self.files, self.seed = run.walk, variant, files, run.config.seed
        self.solver = GroupSolver(run, variant)
        self.options = self.solver.options
        windows = calibration_windows(run)
        self.windows, self.per_batch = len(windows), max(1, run.config.calibration.batch_tokens // windows.shape[1])
        batches = torch.split(windows, self.per_batch)
        self.batches = len(batches)
        self.in_memory = run.config.calibration.activations == "memory"
        self.forward = suspended_forward if self.in_memory else rerun_forward
        if not variant.solver.true_sequential:
            self.forward = parallel_forward
        self.arguments = self.walk.block_arguments(windows.shape[1])
        # The hidden states of the quantized model, and those of the unquantized one where something is compared with it.
        compared = self.options.gptaq_alpha or self.options.tune_epochs
        self.kinds = ("quantized", "reference") if compared else ("quantized",)
        if first == 0 and not files.hidden(0).exists():
            with atomic_directory(files.hidden(0)) as directory:
                for number, batch in enumerate(batches):
                    hidden = self.walk.block_inputs(batch)
                    for kind in self.kinds:
                        HiddenStates.write(directory / kind, number, hidden)
        self.states = self._states(first)

    def _states(self, index: int) -> dict[str, HiddenStates]:
        return {kind: HiddenStates(self.files.hidden(index) / kind, self.in_memory) for kind in self.kinds}

    def __call__(self, index: int) -> None:
        """Quantize part ``index``."""
        if index == self.walk.count:
            self._head(index)
            return
        following = self._states(index + 1)
        with self.walk.loaded_block(index) as block, atomic_directory(self.files.hidden(index + 1)) as directory:
            _BlockStep(self, index, block, following, directory).run()
        shutil.rmtree(self.files.hidden(index))
        self.states = following

    def _head(self, index: int) -> None:
        """The output embedding: its inputs are the hidden states behind the last block, normalized."""
        (layer,) = self.walk.head()
        statistics, done = self.solver.statistics(), {}
        if not skipped(layer, self.variant.solver.skip):
            for batch in range(self.batches):
                inputs = [self.walk.head_inputs(self.states[kind].load(batch)) for kind in self.kinds]
                statistics.add(*inputs)
            done = self.solver.solve([layer], statistics)
        self.files.write(index, done)


class _BlockStep:
    """One decoder block: solve its groups in order, tune what stays continuous, pass the hidden states on."""

    def __init__(
        self, steps: _CalibratedSteps, index: int, block: nn.Module, following: dict[str, HiddenStates], directory: Path
    ) -> None:
        self.steps, self.index, self.block, self.following, self.directory = steps, index, block, following, directory
        self.walk, self.variant, self.states = steps.walk, steps.variant, steps.states
        self.prefix = f"{steps.walk.path}.{index}."
        self.layers = linear_layers(block)
        self.done: dict[str, QuantizedTensor] = {}
        self.dense: dict[str, Tensor] = {}
        self.without_input: list[str] = []

    def run(self) -> None:
        """Do all of it and write the block's file."""
        steps, skip = self.steps, self.variant.solver.skip
        arguments = steps.arguments[self.index]
        observed = find_groups(self.block, self._look(range(steps.batches)), arguments)
        groups = [[name for name in group if not skipped(self.prefix + name, skip)] for group in observed]
        self.scaling = scale_block(
            self.block, self.prefix, arguments, steps.solver, self._stored_dtype, observed, groups, self._some
        )
        self.dense |= self.scaling.dense
        reference = None
        if "reference" in steps.kinds:
            # Parameters are shared: a solved layer's weight is replaced in one block, not changed in both.
            twin = copy.deepcopy(self.block, {id(parameter): parameter for parameter in self.block.parameters()})
            reference = self._stream("reference", twin)
        # Before the forward: should the quantized block route a token to one of these, it meets its final weights.
        for name in _unreached(self.prefix, self.layers, groups, skip):
            self._solve([name], steps.solver.statistics())
        quantized = self._stream("quantized", self.block)
        wanted = [group for group in groups if group]
        with self._rounding(wanted):
            steps.forward(wanted, steps.batches, arguments, quantized, reference, self._solve, steps.solver.statistics)
            if steps.options.tune_epochs and self.done:
                self.dense |= self._tune()
        if self.without_input:
            log.warning("no calibration token reaches %s; rounded to nearest", ", ".join(self.without_input))
        steps.files.write(self.index, self.done, {self.prefix + name: tensor for name, tensor in self.dense.items()})

    def _stream(self, kind: str, module: nn.Module) -> Stream:
        return Stream(
            module,
            lambda batch: self.states[kind].load(batch).to(self.walk.device),
            lambda batch, hidden: self.following[kind].store(self.directory / kind, batch, hidden),
        )

    def _look(self, batches: Iterable[int]) -> Iterator[Tensor]:
        """Inputs of the quantized block from disk: those kept in memory are handed out once."""
        return (HiddenStates.read(self.states["quantized"].directory, i).to(self.walk.device) for i in batches)

    def _some(self, windows: int) -> Iterator[Tensor]:
        """Batches of about as many windows, evenly spread."""
        count = -(-windows // self.steps.per_batch)
        return self._look(range(0, self.steps.batches, max(1, self.steps.batches // count)))

    def _stored_dtype(self, name: str) -> torch.dtype:
        return self.walk.stored_dtype(self.prefix + name)

    def _solve(self, names: list[str], statistics: Statistics) -> None:
        full = [self.prefix + name for name in names]
        if not statistics.count:
            self.without_input += full
        solved = self.steps.solver.solve(
            full, statistics, lambda name: self.scaling.weight(name.removeprefix(self.prefix), self.walk.weight(name))
        )
        for name, tensor in solved.items():
            set_linear_weight(self.layers[name.removeprefix(self.prefix)], tensor.dequantize())
        self.done |= solved
        release_memory()

    @contextlib.contextmanager
    def _rounding(self, groups: list[list[str]]) -> Iterator[None]:
        """While it lasts, layers compute with inputs on the grid that they will have, and what lies behind learns of that.

        Dynamic steps are known beforehand, so solvers get the rounded inputs as well. A static one is found from inputs as they
        are, and holds from then on.
        """

        def dynamic(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (rounded_inputs(args[0], token_steps(args[0])),)

        def static(name: str, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
            step = self.done[name].input_scale if name in self.done else None
            return forward(inputs if step is None else rounded_inputs(inputs, step.to(inputs.device, inputs.dtype)))

        kind = self.steps.options.input_activations
        layers = {name: self.layers[name] for group in groups for name in group} if kind != "none" else {}
        handles = []
        for name, layer in layers.items():
            if kind == "dynamic":
                handles.append(layer.register_forward_pre_hook(dynamic))
            else:
                layer.forward = functools.partial(static, self.prefix + name, layer.forward)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for layer in layers.values():
                layer.__dict__.pop("forward", None)

    def _tune(self) -> dict[str, Tensor]:
        """Tune the block, and run it once more: its outputs have changed. Gives the changed tensors that are not codes."""
        steps, arguments = self.steps, self.steps.arguments[self.index]

        def read(directory: Path, windows: list[int]) -> Tensor:
            return HiddenStates.read_windows(directory, windows, steps.per_batch).to(self.walk.device)

        tuned, dense = tune_block(
            self.block,
            {name.removeprefix(self.prefix): tensor for name, tensor in self.done.items()},
            lambda windows: read(self.states["quantized"].directory, windows),
            lambda windows: read(self.directory / "reference", windows),
            steps.windows,
            steps.per_batch,
            arguments,
            steps.options.tune_epochs,
            steps.seed + self.index,
            {name: self._stored_dtype(name) for name, _ in self.block.named_parameters()},
        )
        self.done = {self.prefix + name: tensor for name, tensor in tuned.items()}
        for name, tensor in tuned.items():
            set_linear_weight(self.layers[name], tensor.dequantize())
        with torch.no_grad():
            for batch in range(steps.batches):
                entering = HiddenStates.read(self.states["quantized"].directory, batch).to(self.walk.device)
                hidden = run_block(self.block, entering, arguments)
                self.following["quantized"].store(self.directory / "quantized", batch, hidden)
        return dense


def _unreached(prefix: str, layers: Iterable[str], groups: list[list[str]], patterns: list[str]) -> list[str]:
    """Layers to quantize that are in no group: experts to which no calibration token is routed."""
    reached = {name for group in groups for name in group}
    return [name for name in layers if name not in reached and not skipped(prefix + name, patterns)]
