"""The stage ``allocate``: bits for each layer under a budget, by what each choice does to the predictions.

Block after block, the calibration windows run through the unquantized model. Every layer is rounded by the variant's own solver
on every grid of ``solver.bit_choices``, and the divergence that each would cause is estimated from the Hessian and the Fisher
information (:mod:`quantize.sensitivity`) or measured by swapping the rounded layer into the model (:mod:`quantize.swapping`).
What is best within the budget (:mod:`quantize.allocation`) becomes ``solver.overrides``. The figures of every block are kept on
disk, so a killed run loses one block, and another budget costs no second look.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from exports.containers import CONTAINERS
from quantize.allocation import choose
from quantize.block_files import BlockFiles, HiddenStates
from quantize.blocks import Arguments, linear_layers
from quantize.choices import candidate_grids
from quantize.config import VariantConfig
from quantize.errors import InputError
from quantize.files import atomic_directory, write_json, write_tensors
from quantize.forwards import run_block
from quantize.grids import Grid
from quantize.group_solver import GroupSolver
from quantize.groups import find_groups
from quantize.knapsack import Option
from quantize.logs import progress
from quantize.manifest import StepRecord, release_memory
from quantize.run import Run, calibration_windows, skipped
from quantize.sensitivity import fisher_information, output_errors, predicted_divergence
from quantize.statistics import Statistics
from quantize.swapping import Swap, SwapBench, Trial

log = logging.getLogger(__name__)

_HELD_BYTES = 2**28  # hidden states of trials that pass through the blocks together


def options_of(run: Run, variant: VariantConfig, layer: str, shape: tuple[int, int]) -> list[Grid]:
    """The grids a layer may be on: that of an override of the recipe that names it, else every candidate that can be stored.

    Raises:
        InputError: its container can store none of them.
    """
    container = CONTAINERS[variant.container]
    if any(re.search(override.match, layer) for override in variant.solver.overrides):
        return [run.grid(variant, layer)]
    stored, reasons = [], []
    for grid in candidate_grids(variant.solver):
        found = replace(grid, zero_min=container.zero_min, scale_dtype=run.grid(variant).scale_dtype)
        try:
            container.check(layer, *shape, found)
            stored.append(found)
        except InputError as error:
            reasons.append(str(error))
    if not stored:
        raise InputError(f"solver.bit_choices: none can be stored for {layer}: {'; '.join(reasons)}")
    return stored


class _Sensitivities:
    """What every layer would cost on each of its grids, block after block."""

    def __init__(self, run: Run, variant: VariantConfig, files: BlockFiles) -> None:
        self.run, self.variant, self.files, self.walk = run, variant, files, run.walk
        self.parts = [
            {
                name: options_of(run, variant, name, shape)
                for name, shape in run.walk.layer_names(index).items()
                if not skipped(name, variant.solver.skip)
            }
            for index in range(run.walk.count)
        ]
        windows = calibration_windows(run)
        per_batch = max(1, run.config.calibration.batch_tokens // windows.shape[1])
        self.batches = torch.split(windows, per_batch)
        self.arguments = run.walk.block_arguments(windows.shape[1])
        self.in_memory = run.config.calibration.activations == "memory"
        self.measured = variant.solver.sensitivity == "measured"
        self.windows = windows[: variant.solver.sensitivity_windows]
        self.bench: SwapBench | None = None
        self.fisher: dict[str, Tensor] = {}

    def run_blocks(self) -> None:
        """Do every block that has no file yet."""
        files, first = self.files, self.files.done(with_hidden=True)
        if first == files.count:
            return
        if first == 0:
            files.forget_seconds()
        else:
            log.info("going on after block %d of %d", first, files.count)
        self.bench = SwapBench(self.walk, self.windows)
        if not self.measured:
            self.fisher = self._fisher()
        if first == 0 and not files.hidden(0).exists():
            with atomic_directory(files.hidden(0)) as directory:
                for number, batch in enumerate(self.batches):
                    HiddenStates.write(directory, number, self.walk.block_inputs(batch))
        states = HiddenStates(files.hidden(first), self.in_memory)
        for index in progress(range(first, files.count), "allocate", total=files.count, done=first):
            started = time.perf_counter()
            states = self._block(index, states)
            release_memory()
            files.add_seconds(time.perf_counter() - started)

    def _fisher(self) -> dict[str, Tensor]:
        assert self.bench is not None
        file = self.files.directory / "fisher.safetensors"
        if not file.exists():
            write_tensors(file, fisher_information(self.bench, self.run.config.seed))
        with safe_open(file, "pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118

    def _block(self, index: int, states: HiddenStates) -> HiddenStates:
        following = HiddenStates(self.files.hidden(index + 1), self.in_memory)
        sizes: dict[str, list[int]] = {}
        costs: dict[str, list[float]] = {}
        swaps: dict[str, Trial] = {}
        with self.walk.loaded_block(index) as block, atomic_directory(self.files.hidden(index + 1)) as directory:
            arguments = self.arguments[index]
            batches = range(len(self.batches))
            # A look does not use a batch up, as loading for the forward would.
            seen = (HiddenStates.read(states.directory, batch).to(self.walk.device) for batch in batches)
            groups = find_groups(block, seen, arguments)
            collected = self._collect(block, groups, arguments, states, following, directory)
            reached = {name for group in groups for name in group}
            groups += [[name] for name in linear_layers(block) if name not in reached]
            collected += [Statistics() for _ in range(len(groups) - len(collected))]
            prefix = f"{self.walk.path}.{index}."
            for group, statistics in zip(groups, collected, strict=True):
                for name in (prefix + name for name in group if prefix + name in self.parts[index]):
                    sizes[name], costs[name], rounded = self._layer(name, self.parts[index][name], statistics)
                    if self.measured:
                        swaps |= {f"{name}:{number}": {name: Swap(weight)} for number, weight in enumerate(rounded)}
        for label, divergence in self._measure(swaps).items():
            name, _, number = label.rpartition(":")
            costs[name][int(number)] = divergence
        write_tensors(self.files.path(index), _packed(sizes, costs))
        shutil.rmtree(self.files.hidden(index))
        return following

    def _collect(
        self,
        block: nn.Module,
        groups: list[list[str]],
        arguments: Arguments,
        states: HiddenStates,
        following: HiddenStates,
        directory: Path,
    ) -> list[Statistics]:
        """Statistics of every group's inputs, in the forward that makes what enters the next block."""
        collected = [Statistics() for _ in groups]
        layers = linear_layers(block)

        def watch(number: int) -> Any:
            return lambda _, args: collected[number].add(args[0])

        handles = [layers[group[0]].register_forward_pre_hook(watch(number)) for number, group in enumerate(groups)]
        try:
            with torch.no_grad():
                for batch in range(len(self.batches)):
                    hidden = states.load(batch).to(self.walk.device)
                    following.store(directory, batch, run_block(block, hidden, arguments))
        finally:
            for handle in handles:
                handle.remove()
        return collected

    def _layer(self, name: str, grids: list[Grid], statistics: Statistics) -> tuple[list[int], list[float], list[Tensor]]:
        """For each grid: bytes, the estimated divergence (0 where it is to be measured), and the rounded weight if so."""
        weight, sizes, costs, rounded = self.walk.weight(name), [], [], []
        hessian = statistics.hessian() if statistics.count else None
        for grid in grids:
            solver = replace(self.variant.solver, bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric)
            alone = replace(self.variant, solver=replace(solver, overrides=[]))
            tensor = GroupSolver(self.run, alone).solve([name], statistics)[name]
            sizes.append(tensor.nbytes())
            if self.measured:
                rounded.append(tensor.dequantize())
            if self.measured or hessian is None or name not in self.fisher:
                costs.append(0.0)
            else:
                errors = output_errors(tensor.dequantize() - weight, hessian)
                costs.append(predicted_divergence(self.fisher[name].to(errors.device), errors))
        return sizes, costs, rounded

    def _measure(self, swaps: Mapping[str, Trial]) -> dict[str, float]:
        assert self.bench is not None
        at_once = max(1, _HELD_BYTES // (self.bench.states[0].numel() * 4))
        labels, found = list(swaps), dict[str, float]()
        for start in range(0, len(labels), at_once):
            found.update(self.bench.divergences({label: swaps[label] for label in labels[start : start + at_once]}))
        return found


def _packed(sizes: Mapping[str, list[int]], costs: Mapping[str, list[float]]) -> dict[str, Tensor]:
    return {f"{name}.bytes": torch.tensor(values) for name, values in sizes.items()} | {
        f"{name}.divergence": torch.tensor(values, dtype=torch.float64) for name, values in costs.items()
    }


def _read(file: Path) -> Iterator[tuple[str, list[Option]]]:
    with safe_open(file, "pt") as stored:
        for name in (key.removesuffix(".bytes") for key in stored.keys() if key.endswith(".bytes")):  # noqa: SIM118
            sizes, costs = stored.get_tensor(f"{name}.bytes").tolist(), stored.get_tensor(f"{name}.divergence").tolist()
            yield name, [Option(size, cost) for size, cost in zip(sizes, costs, strict=True)]


def allocate(run: Run, name: str, key: str, record: StepRecord) -> dict[str, Any]:
    """Choose every layer's grid; writes ``allocation/NAME.json`` and returns what it holds.

    Args:
        run: the run.
        name: the variant.
        key: of the sensitivities: of everything they depend on, which the budget is not.
        record: gets the files, and as its result the ``overrides``.

    Raises:
        InputError: a budget that no choice meets, or a layer that can be stored on no candidate grid.
    """
    variant = run.config.variants[name]
    files = BlockFiles(run.work("allocate", name), key, run.walk.count)
    started = time.perf_counter()
    sensitivities = _Sensitivities(run, variant, files)
    sensitivities.run_blocks()
    record.earlier_seconds = files.earlier_seconds(started)
    grids = {layer: choices for part in sensitivities.parts for layer, choices in part.items()}
    options = {layer: found for index in range(files.count) for layer, found in _read(files.path(index))}
    options = {layer: options[layer] for layer in grids}
    shapes = {layer: shape for index in range(run.walk.count) for layer, shape in run.walk.layer_names(index).items()}
    result = choose(variant, grids, options, {layer: shapes[layer][0] * shapes[layer][1] for layer in grids})
    path = run.directory / "allocation" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    record.files = [*files.finish(), path]
    record.result = {key: result[key] for key in ("overrides", "bytes", "bits", "divergence")}
    return result
