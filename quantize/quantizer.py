"""Quantizing the decoder blocks of one variant, one block after another, so that a killed run loses one block at most.

What is on disk after block ``i``: its codes in ``block-i.safetensors``, and for solvers with calibration the hidden states that
enter block ``i + 1`` in ``hidden/i+1``. Both are written atomically, in that order; the next run goes on where both exist.
"""

from __future__ import annotations

import copy
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from quantize.blocks import linear_layers, set_linear_weight
from quantize.config import VariantConfig
from quantize.files import atomic_directory, write_tensors, write_text
from quantize.forwards import Statistics, Stream, find_groups, parallel_forward, rerun_forward, suspended_forward
from quantize.grids import Grid, QuantizedTensor
from quantize.logs import progress
from quantize.manifest import release_memory
from quantize.run import Run, calibration_windows, grid_of, solver_options
from quantize.solvers import SOLVERS, LayerProblem

log = logging.getLogger(__name__)
_PARTS = ("codes", "scales", "zeros", "g_idx")


def skipped(layer: str, patterns: list[str]) -> bool:
    """Whether a layer's full name matches one of the regular expressions in ``solver.skip``."""
    return any(re.search(pattern, layer) for pattern in patterns)


class BlockFiles:
    """The files of a quantization in progress: one for each finished block, and the newest hidden states."""

    def __init__(self, directory: Path, key: str, count: int) -> None:
        """Open ``directory``; what was made under another ``key`` is discarded."""
        self.directory, self.count = directory, count
        key_file = directory / "key"
        if not key_file.exists() or key_file.read_text() != key:
            shutil.rmtree(directory, ignore_errors=True)
            write_text(key_file, key)

    def path(self, index: int) -> Path:
        """The file of block ``index``."""
        return self.directory / f"block-{index:05d}.safetensors"

    def hidden(self, index: int) -> Path:
        """The directory of the hidden states that enter block ``index``."""
        return self.directory / "hidden" / f"{index:05d}"

    def done(self, with_hidden: bool) -> int:
        """Number of leading blocks that need not be done again."""
        done = 0
        while done < self.count and self.path(done).exists():
            done += 1
        if not with_hidden or done == self.count:
            return done
        return max((index for index in range(1, done + 1) if self.hidden(index).exists()), default=0)

    def write(self, index: int, layers: dict[str, QuantizedTensor]) -> None:
        """Write a block's quantized layers."""
        tensors = {f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in _PARTS}
        write_tensors(self.path(index), tensors)

    def add_seconds(self, seconds: float) -> None:
        """Note time spent, so that a resumed run reports all of it."""
        write_text(self.directory / "seconds", f"{self._seconds() + seconds:.3f}")

    def forget_seconds(self) -> None:
        """Drop the time noted so far: what it was spent on has to be done again."""
        (self.directory / "seconds").unlink(missing_ok=True)

    def _seconds(self) -> float:
        file = self.directory / "seconds"
        return float(file.read_text()) if file.exists() else 0.0

    def earlier_seconds(self, started: float) -> float:
        """Seconds noted beyond those since ``started`` (a ``time.perf_counter`` reading)."""
        return max(0.0, self._seconds() - (time.perf_counter() - started))

    def finish(self) -> list[Path]:
        """Drop what only an unfinished quantization needs; returns the block files."""
        shutil.rmtree(self.directory / "hidden", ignore_errors=True)
        return [self.path(index) for index in range(self.count)]

    @staticmethod
    def read_all(directory: Path, variant: VariantConfig) -> Iterator[tuple[str, QuantizedTensor]]:
        """All quantized layers of a finished quantization, block by block."""
        for path in sorted(directory.glob("block-*.safetensors")):
            with safe_open(path, "pt") as file:
                layers = sorted({name.rsplit(".", 1)[0] for name in file.keys()})  # noqa: SIM118
                for layer in layers:
                    parts = {part: file.get_tensor(f"{layer}.{part}") for part in _PARTS}
                    yield layer, QuantizedTensor(**parts, grid=grid_of(variant, layer))


class HiddenStates:
    """The hidden states between two blocks, in batches: on disk always (to resume from), and in memory if wanted."""

    def __init__(self, directory: Path, in_memory: bool) -> None:
        self.directory, self._in_memory = directory, in_memory
        self._kept: dict[int, Tensor] = {}

    def load(self, batch: int) -> Tensor:
        """Hidden states of one batch, ``[windows, tokens, hidden]``."""
        # Handed out once: the forward lets go of its input half way through the block, and so must this.
        if batch in self._kept:
            return self._kept.pop(batch)
        with safe_open(self._file(self.directory, batch), "pt") as file:
            tensor: Tensor = file.get_tensor("hidden")
        return tensor

    def store(self, directory: Path, batch: int, hidden: Tensor) -> None:
        """Write one batch below ``directory`` (temporary, renamed by the caller when all are there)."""
        hidden = hidden.detach()
        self.write(directory, batch, hidden)
        if self._in_memory:
            self._kept[batch] = hidden

    @classmethod
    def write(cls, directory: Path, batch: int, hidden: Tensor) -> None:
        """Write one batch's file below ``directory``."""
        write_tensors(cls._file(directory, batch), {"hidden": hidden})

    @staticmethod
    def _file(directory: Path, batch: int) -> Path:
        return directory / f"batch-{batch:05d}.safetensors"


def quantize_blocks(run: Run, variant: VariantConfig, files: BlockFiles) -> None:
    """Quantize every block that ``files`` does not have yet."""
    with_hidden = SOLVERS[variant.solver.name].needs_calibration
    first = files.done(with_hidden)
    if first == 0:
        files.forget_seconds()
    else:
        log.info("going on after block %d of %d", first, files.count)
    step = _calibrated_step(run, variant, files, first) if with_hidden else _plain_step(run, variant, files)
    for index in progress(range(first, files.count), "quantize", total=files.count, done=first):
        started = time.perf_counter()
        step(index)
        files.add_seconds(time.perf_counter() - started)


def _plain_step(run: Run, variant: VariantConfig, files: BlockFiles) -> Callable[[int], None]:
    """Blocks of a solver that needs no data."""
    solver, options = SOLVERS[variant.solver.name], solver_options(run.config, variant)

    def step(index: int) -> None:
        done = {}
        for layer in run.walk.layer_names(index):
            if not skipped(layer, variant.solver.skip):
                problem = LayerProblem([layer], [run.walk.weight(layer)], grid_of(variant, layer), None, options)
                done[layer] = solver.solve(problem)[0]
        files.write(index, done)

    return step


def _calibrated_step(run: Run, variant: VariantConfig, files: BlockFiles, first: int) -> Callable[[int], None]:
    """Blocks of a solver that sees the inputs of each layer, block ``first`` being the next."""
    walk, solver, options, calibration = (
        run.walk,
        SOLVERS[variant.solver.name],
        solver_options(run.config, variant),
        run.config.calibration,
    )
    windows = calibration_windows(run)
    batches = torch.split(windows, max(1, calibration.batch_tokens // windows.shape[1]))
    in_memory = calibration.activations == "memory"
    forward = suspended_forward if in_memory else rerun_forward
    if not variant.solver.true_sequential:
        forward = parallel_forward
    arguments = walk.block_arguments(windows.shape[1])
    # The hidden states of the quantized model, and those of the unquantized one where the solver wants to know the drift.
    kinds = ("quantized", "reference") if options.gptaq_alpha else ("quantized",)
    if first == 0 and not files.hidden(0).exists():
        with atomic_directory(files.hidden(0)) as directory:
            for i, batch in enumerate(batches):
                hidden = walk.block_inputs(batch)
                for kind in kinds:
                    HiddenStates.write(directory / kind, i, hidden)
    states = {kind: HiddenStates(files.hidden(first) / kind, in_memory) for kind in kinds}

    def step(index: int) -> None:
        nonlocal states
        done: dict[str, QuantizedTensor] = {}
        prefix = f"{walk.path}.{index}."
        following = {kind: HiddenStates(files.hidden(index + 1) / kind, in_memory) for kind in kinds}
        with walk.loaded_block(index) as block, atomic_directory(files.hidden(index + 1)) as directory:
            # Parameters are shared: a solved layer's weight is replaced in one block, not changed in both.
            twin = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
            layers = linear_layers(block)
            groups = [
                [name for name in group if not skipped(prefix + name, variant.solver.skip)]
                for group in find_groups(block, states["quantized"].load(0).to(walk.device), arguments[index])
            ]
            _require_all(prefix, layers, groups, variant.solver.skip)

            def solve(names: list[str], statistics: Statistics) -> None:
                hessian, drift = statistics.hessian(), statistics.drift()
                for grid, members in _by_grid(variant, [prefix + name for name in names]).items():
                    weights = [walk.weight(name) for name in members]
                    problem = LayerProblem(members, weights, grid, hessian, options, drift, statistics.count)
                    for name, tensor in zip(members, solver.solve(problem), strict=True):
                        set_linear_weight(layers[name.removeprefix(prefix)], tensor.dequantize())
                        done[name] = tensor
                release_memory()

            def stream(kind: str, module: nn.Module) -> Stream:
                return Stream(
                    module,
                    lambda batch: states[kind].load(batch).to(walk.device),
                    lambda batch, hidden: following[kind].store(directory / kind, batch, hidden),
                )

            forward(
                [group for group in groups if group],
                len(batches),
                arguments[index],
                stream("quantized", block),
                stream("reference", twin) if "reference" in kinds else None,
                solve,
            )
            files.write(index, done)
        shutil.rmtree(files.hidden(index))
        states = following
        release_memory()

    return step


def _by_grid(variant: VariantConfig, names: list[str]) -> dict[Grid, list[str]]:
    """Layers that share an input and are solved together: those on the same grid."""
    members: dict[Grid, list[str]] = {}
    for name in names:
        members.setdefault(grid_of(variant, name), []).append(name)
    return members


def _require_all(prefix: str, layers: Iterable[str], groups: list[list[str]], patterns: list[str]) -> None:
    reached = {name for group in groups for name in group}
    for name in layers:
        if name not in reached and not skipped(prefix + name, patterns):
            raise ValueError(f"{prefix}{name} got no calibration input; add it to solver.skip")
