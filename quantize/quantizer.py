"""Quantizing the decoder blocks of one variant, one block after another, so that a killed run loses one block at most.

What is on disk after block ``i``: its codes in ``block-i.safetensors``, and for solvers with calibration the hidden states that
enter block ``i + 1`` in ``hidden/i+1``. Both are written atomically, in that order; the next run goes on where both exist.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from quantize.blocks import linear_layers, set_linear_weight
from quantize.config import VariantConfig
from quantize.experts import is_router
from quantize.files import atomic_directory, write_tensors, write_text
from quantize.forwards import Hessian, find_groups, parallel_forward, rerun_forward, suspended_forward
from quantize.grids import Grid, QuantizedTensor
from quantize.logs import progress
from quantize.manifest import release_memory
from quantize.run import Run, calibration_windows
from quantize.solvers import SOLVERS, LayerProblem, SolverOptions

log = logging.getLogger(__name__)
_PARTS = ("codes", "scales", "zeros", "g_idx")


def skipped(layer: str, patterns: list[str]) -> bool:
    """Whether a layer is a router, or its full name matches one of the regular expressions in ``solver.skip``."""
    return is_router(layer) or any(re.search(pattern, layer) for pattern in patterns)


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
    def read_all(directory: Path, grid: Grid) -> Iterator[tuple[str, QuantizedTensor]]:
        """All quantized layers of a finished quantization, block by block."""
        for path in sorted(directory.glob("block-*.safetensors")):
            with safe_open(path, "pt") as file:
                layers = sorted({name.rsplit(".", 1)[0] for name in file.keys()})  # noqa: SIM118
                for layer in layers:
                    parts = {part: file.get_tensor(f"{layer}.{part}") for part in _PARTS}
                    yield layer, QuantizedTensor(**parts, grid=grid)


class HiddenStates:
    """The hidden states between two blocks, in batches: on disk always (to resume from), and in memory if wanted."""

    def __init__(self, directory: Path, batches: int, in_memory: bool) -> None:
        self.directory, self.batches, self._in_memory = directory, batches, in_memory
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
        write_tensors(self._file(directory, batch), {"hidden": hidden})
        if self._in_memory:
            self._kept[batch] = hidden

    @staticmethod
    def _file(directory: Path, batch: int) -> Path:
        return directory / f"batch-{batch:05d}.safetensors"


def quantize_blocks(run: Run, variant: VariantConfig, grid: Grid, files: BlockFiles) -> None:
    """Quantize every block that ``files`` does not have yet."""
    with_hidden = SOLVERS[variant.solver.name].needs_calibration
    first = files.done(with_hidden)
    if first == 0:
        files.forget_seconds()
    else:
        log.info("going on after block %d of %d", first, files.count)
    step = _calibrated_step(run, variant, grid, files, first) if with_hidden else _plain_step(run, variant, grid, files)
    for index in progress(range(first, files.count), "quantize", total=files.count, done=first):
        started = time.perf_counter()
        step(index)
        files.add_seconds(time.perf_counter() - started)


def _options(run: Run, variant: VariantConfig) -> SolverOptions:
    solver = variant.solver
    return SolverOptions(
        desc_act=solver.desc_act,
        damp_percent=solver.damp_percent,
        block_size=solver.block_size,
        quality=run.config.quality,
    )


def _plain_step(run: Run, variant: VariantConfig, grid: Grid, files: BlockFiles) -> Callable[[int], None]:
    """Blocks of a solver that needs no data."""
    solver, options = SOLVERS[variant.solver.name], _options(run, variant)

    def step(index: int) -> None:
        done = {}
        for layer in run.walk.layer_names(index):
            if not skipped(layer, variant.solver.skip):
                problem = LayerProblem([layer], [run.walk.weight(layer)], grid, None, options)
                done[layer] = solver.solve(problem)[0]
        files.write(index, done)

    return step


def _calibrated_step(run: Run, variant: VariantConfig, grid: Grid, files: BlockFiles, first: int) -> Callable[[int], None]:
    """Blocks of a solver that sees the inputs of each layer, block ``first`` being the next."""
    walk, solver, options, calibration = (
        run.walk,
        SOLVERS[variant.solver.name],
        _options(run, variant),
        run.config.calibration,
    )
    windows = calibration_windows(run)
    batches = torch.split(windows, max(1, calibration.batch_tokens // windows.shape[1]))
    in_memory = calibration.activations == "memory"
    forward = suspended_forward if in_memory else rerun_forward
    if not variant.solver.true_sequential:
        forward = parallel_forward
    arguments = walk.block_arguments(windows.shape[1])
    if first == 0 and not files.hidden(0).exists():
        with atomic_directory(files.hidden(0)) as directory:
            for i, batch in enumerate(batches):
                write_tensors(HiddenStates._file(directory, i), {"hidden": walk.block_inputs(batch)})
    state = HiddenStates(files.hidden(first), len(batches), in_memory)

    def step(index: int) -> None:
        nonlocal state
        done: dict[str, QuantizedTensor] = {}
        prefix = f"{walk.path}.{index}."
        following = HiddenStates(files.hidden(index + 1), len(batches), in_memory)
        with walk.loaded_block(index) as block, atomic_directory(following.directory) as directory:
            layers = linear_layers(block)
            groups = [
                [name for name in group if not skipped(prefix + name, variant.solver.skip)]
                for group in find_groups(block, (state.load(i).to(walk.device) for i in range(len(batches))), arguments[index])
            ]
            without_input: list[str] = []

            def solve(names: list[str], hessian: Hessian) -> None:
                weights = [walk.weight(prefix + name) for name in names]
                value = hessian.value() if hessian.count else None
                problem = LayerProblem([prefix + name for name in names], weights, grid, value, options)
                if value is None:
                    without_input.extend(problem.names)
                used = SOLVERS["rtn"] if value is None else solver
                for name, tensor in zip(names, used.solve(problem), strict=True):
                    set_linear_weight(layers[name], tensor.dequantize())
                    done[prefix + name] = tensor
                release_memory()

            # Before the forward: should the quantized block route a token to one of these, it meets its final weights.
            for name in _unreached(prefix, layers, groups, variant.solver.skip):
                solve([name], Hessian())
            forward(
                block,
                [group for group in groups if group],
                len(batches),
                lambda batch: state.load(batch).to(walk.device),
                lambda batch, hidden: following.store(directory, batch, hidden),
                arguments[index],
                solve,
            )
            if without_input:
                log.warning("no calibration token reaches %s; rounded to nearest", ", ".join(without_input))
            files.write(index, done)
        shutil.rmtree(state.directory)
        state = following
        release_memory()

    return step


def _unreached(prefix: str, layers: Iterable[str], groups: list[list[str]], patterns: list[str]) -> list[str]:
    """Layers to quantize that are in no group: experts to which no calibration token is routed."""
    reached = {name for group in groups for name in group}
    return [name for name in layers if name not in reached and not skipped(prefix + name, patterns)]
