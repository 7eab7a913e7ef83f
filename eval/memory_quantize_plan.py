"""The memory plan of a quantization: its steps carried out on paper, for one block of each kind.

The steps are :mod:`quantize.quantizer`'s own; only what they read and write is replaced (see
:mod:`eval.memory_quantize_stand_ins`), and what repeats itself is cut short: blocks of a kind, lazy blocks of columns, steps of
a search and epochs of tuning beyond the first ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from eval.memory_geometry import block_path, first_blocks, skeleton
from eval.memory_quantize_stand_ins import PaperCheckpoint, PaperFiles, PaperHiddenStates, paper_hidden_states
from eval.memory_quantize_trace import LazyBlockDone, Ledger, OnPaper, Phase
from quantize import quantizer
from quantize.blocks import DecoderWalk
from quantize.config import RunConfig, VariantConfig
from quantize.devices import resolve_compute_dtype
from quantize.errors import InputError, one_line
from quantize.files import write_tensors
from quantize.grids import Grid
from quantize.run import Run, needs_calibration
from quantize.solvers import SOLVERS, awq, gptq
from quantize.solvers.base import SolverOptions
from quantize.stages import selected_layers

# What torch sets aside for cuBLAS on a Hopper GPU; 8 MiB on earlier ones.
CUDA_WORKSPACE = 32 * 2**20
_BATCHES = 3  # that wait on disk: each is gone before the next
_SCALED_BY = 16  # windows by which scales are chosen
_SEARCH_STEPS = 2  # of a search: the second has all that any later one has


@dataclass(frozen=True)
class QuantizationPlan:
    """What quantizing one variant needs; sizes in bytes.

    Attributes:
        variant: its name.
        solver: its solver's name.
        device: ``cuda`` or ``cpu``.
        compute_dtype: the type of calibration forwards.
        phases: peak of each phase, and what is alive then, in order of time. Empty where the quantize step does not exist: the
            weights stay as they are, or the container's own program quantizes.
        workspace: set aside by the device's libraries.
        hidden_states: the largest set of hidden states on disk: those that enter a block and those that leave it.
        written: the largest file written at once, a block's codes or a batch of hidden states; the host's memory holds a copy.
        mapped: pages of the checkpoint's files that are mapped at once. The system takes them back where it needs to.
    """

    variant: str
    solver: str
    device: str
    compute_dtype: str
    phases: dict[str, Phase]
    workspace: int
    hidden_states: int
    written: int
    mapped: int

    @property
    def peak_bytes(self) -> int:
        """The largest phase and the workspace."""
        return max((phase.peak for phase in self.phases.values()), default=0) + (self.workspace if self.phases else 0)

    def as_dict(self) -> dict[str, Any]:
        """JSON values: the fields, and ``peak_bytes``."""
        return {**dataclasses.asdict(self), "peak_bytes": self.peak_bytes}


def plan_variant(config: RunConfig, name: str, model: Any, device: torch.device) -> QuantizationPlan:
    """Plan the quantization of ``config.variants[name]``.

    Args:
        config: the validated recipe.
        name: of the variant.
        model: transformers' config of the model.
        device: where it is to run; it need not be on this machine.

    Raises:
        InputError: the variant does not exist for the model's shapes, the model is of experts, or its forward cannot be
            followed without data.
    """
    variant, stored = config.variants[name], stored_dtype(model)
    dtype = resolve_compute_dtype(config.model.compute_dtype, device, stored)
    solver = SOLVERS[variant.solver.name]
    about = {"variant": name, "solver": variant.solver.name, "device": device.type, "compute_dtype": str(dtype)[6:]}
    if not solver.quantizes or solver.container:
        return QuantizationPlan(**about, phases={}, workspace=0, hidden_states=0, written=0, mapped=0)
    checkpoint = PaperCheckpoint(Path(config.model.path or "the demo model"), model, stored)
    ledger = Ledger(variant.solver.group_size, device.type == "cpu")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(dataclasses.replace(config, device="cpu"), Path(folder), str(checkpoint.path))
        run.checkpoint = checkpoint
        run.walk = DecoderWalk(checkpoint, torch.device("meta"), dtype)
        blocks = _representatives(model, stored, config.calibration.activations == "memory")
        try:
            with _on_paper(ledger, device):
                for buffer in run.walk._model.buffers():
                    ledger.hold(buffer)
                hidden, written = _carry_out(run, name, ledger, blocks)
        except (RuntimeError, NotImplementedError, TypeError, AttributeError, IndexError) as error:
            raise InputError(
                f"model_type={model.model_type}: its quantization cannot be followed without data ({one_line(error)}); this "
                "family is not supported by the memory plan"
            ) from error
    return QuantizationPlan(
        **about,
        phases=ledger.ordered(),
        workspace=CUDA_WORKSPACE if device.type == "cuda" else 0,
        hidden_states=hidden,
        written=written,
        mapped=checkpoint.mapped_bytes,
    )


def stored_dtype(model: Any) -> torch.dtype:
    """The type of a checkpoint's tensors by its config; float16 where that does not say."""
    dtype: torch.dtype = getattr(torch, str(model.dtype or "float16").removeprefix("torch."))
    return dtype


def _carry_out(run: Run, name: str, ledger: Ledger, blocks: list[int]) -> tuple[int, int]:
    """The quantize step of a variant, for some of the blocks and the output embedding.

    Returns:
        Bytes of the hidden states on disk before and behind a block, and of the largest file written.
    """
    variant, calibration = run.config.variants[name], run.config.calibration
    selected_layers(run, variant)
    parts = quantizer.parts_of(run, variant)
    files = PaperFiles(run.work("quantize", name), "", len(parts))
    chosen = [*blocks, *range(run.walk.count, len(parts))]
    if not needs_calibration(variant.solver):
        plain = quantizer._PlainSteps(run, variant, files, 0)
        for index in chosen:
            plain(index)
        return 0, files.largest
    samples = _samples(run.config, variant)
    windows = torch.zeros(samples, calibration.seq_len, dtype=torch.int64)
    write_tensors(run.work("calibration", "windows.safetensors"), {"windows": windows})
    steps = quantizer._CalibratedSteps(run, variant, files, 0)
    steps.options = steps.solver.options = _shortened(steps.options)
    _tell_groups_apart(steps, ledger)
    for index in chosen:
        files.hidden(index).mkdir(parents=True, exist_ok=True)  # of blocks that are left out
        steps(index)
    batches = cast(type[PaperHiddenStates], quantizer.HiddenStates).batch_bytes()
    hidden = sum(batches) * calibration.num_samples // samples
    return 2 * len(steps.kinds) * hidden, max([files.largest, *batches])


def _samples(config: RunConfig, variant: VariantConfig) -> int:
    """Windows that show what all need: where batches wait on disk and leave nothing behind, those of the first ones."""
    calibration, solver = config.calibration, variant.solver
    keeps_rows = solver.smoothquant or solver.input_activations == "static"
    if calibration.activations == "memory" or keeps_rows:
        return calibration.num_samples
    windows = _BATCHES * max(1, calibration.batch_tokens // calibration.seq_len)
    return min(calibration.num_samples, max(windows, _SCALED_BY if SOLVERS[solver.name].find_scales else 0))


def _tell_groups_apart(steps: Any, ledger: Ledger) -> None:
    """Each group of layers is a phase of its own."""
    solve = steps.solver.solve

    def told(names: list[str], *args: Any) -> Any:
        ledger.detail = ", ".join(name.rpartition(".")[2] for name in names)
        return solve(names, *args)

    steps.solver.solve = told


def _shortened(options: SolverOptions) -> SolverOptions:
    return dataclasses.replace(
        options, search_steps=min(options.search_steps, _SEARCH_STEPS), tune_epochs=min(options.tune_epochs, 1)
    )


def _representatives(model: Any, dtype: torch.dtype, in_memory: bool) -> list[int]:
    """The first block of each kind; and the second, where hidden states are in memory once a block has put them out."""
    whole = skeleton(model, dtype)
    kinds = first_blocks(whole, model, block_path(whole, model))
    firsts = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
    return sorted({*firsts.values(), *([min(1, len(kinds) - 1)] if in_memory else [])})


@contextlib.contextmanager
def _on_paper(ledger: Ledger, device: torch.device) -> Iterator[None]:
    """While it lasts, the quantizer's files are notes, and of what a solver repeats the first is done."""
    stand_ins: list[tuple[Any, str, Any]] = [
        (quantizer, "HiddenStates", paper_hidden_states(ledger)),
        (gptq, "feed_back", functools.partial(_first_lazy_block, gptq.feed_back)),
        (awq, "clipped_params", functools.partial(_first_slice, awq.clipped_params, set())),
    ]
    originals = [getattr(module, name) for module, name, _ in stand_ins]
    for module, name, stand_in in stand_ins:
        setattr(module, name, stand_in)
    try:
        with OnPaper(ledger, device.type == "cpu"), ledger:
            yield
    finally:
        for (module, name, _), original in zip(stand_ins, originals, strict=True):
            setattr(module, name, original)


def _first_lazy_block(
    feed_back: Callable[..., Any],
    weight: Tensor,
    factor: Tensor,
    importance: Tensor,
    grid: Grid,
    plan: gptq.ColumnPlan,
    options: SolverOptions,
    params: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GPTQ's loop over columns up to the end of its first lazy block, and what it would give."""
    with contextlib.suppress(LazyBlockDone):
        feed_back(weight, factor, importance, grid, plan, options, params)
    rows, columns = weight.shape
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(grid.num_groups(columns), rows, device=weight.device)
    return codes.t(), scales.t(), torch.empty_like(scales).t(), torch.empty(rows, device=weight.device)


def _first_slice(
    clipped_params: Callable[..., Any], seen: set[torch.Size], groups: Tensor, blocks: Tensor, grid: Grid, steps: int
) -> tuple[Tensor, Tensor]:
    """AWQ's search for the ranges of a slice of rows, carried out for the first of each shape."""
    if groups.shape not in seen:
        seen.add(groups.shape)
        clipped_params(groups, blocks, grid, steps)
    return groups.new_empty(groups.shape[:-1]), groups.new_empty(groups.shape[:-1])
