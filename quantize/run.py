"""One run: the recipe, its directory, and what the stages share."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from exports import gguf
from exports.containers import CONTAINERS
from quantize.blocks import DecoderWalk
from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.choices import budgeted, candidate_grids
from quantize.config import QUALITIES, OverrideConfig, RunConfig, SolverConfig, VariantConfig
from quantize.devices import resolve_compute_dtype, resolve_device
from quantize.experts import is_router
from quantize.gguf_grids import gguf_grid
from quantize.grids import Grid
from quantize.solvers import SOLVERS, SolverOptions


@dataclass
class Run:
    """One run directory and what its stages share.

    Attributes:
        config: the validated recipe.
        directory: the run directory, ``output_dir``.
        model_path: ``model.path``, or the demo model's directory.
    """

    config: RunConfig
    directory: Path
    model_path: str
    device: torch.device = field(init=False)
    _stored: dict[str, dict[str, gguf.Stored]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.device = resolve_device(self.config.device)

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, opened once."""
        return open_checkpoint(self.model_path)

    @functools.cached_property
    def stored_dtype(self) -> torch.dtype:
        """The type of the checkpoint's tensors (of its first: asked for once, and not for every layer)."""
        return self.checkpoint.dtype(self.checkpoint.names()[0])

    @functools.cached_property
    def walk(self) -> DecoderWalk:
        """The block walk over the checkpoint, built once."""
        dtype = resolve_compute_dtype(self.config.model.compute_dtype, self.device, self.stored_dtype)
        return DecoderWalk(self.checkpoint, self.device, dtype)

    def dense_dtype(self, variant: VariantConfig) -> torch.dtype:
        """The type of a variant's unquantized tensors: its ``dtype``, else the checkpoint's."""
        if variant.dtype is not None:
            return cast(torch.dtype, getattr(torch, variant.dtype))
        return self.stored_dtype

    def file_type(self, variant: VariantConfig) -> str:
        """The type of a variant's GGUF file by llama.cpp's name, such as ``Q4_0``."""
        if variant.grid is not None:
            return variant.grid.upper()
        return {torch.float32: "F32", torch.bfloat16: "BF16"}.get(self.dense_dtype(variant), "F16")

    def stored(self, variant: VariantConfig) -> dict[str, gguf.Stored]:
        """Where each tensor goes in a variant's GGUF file, by name.

        Raises:
            InputError: llama.cpp has no such architecture.
        """
        file_type, skip = self.file_type(variant), variant.solver.skip
        key = repr((file_type, solves(variant), variant.pure, variant.token_embedding_type, variant.output_tensor_type, skip))
        if key not in self._stored:
            shapes = {self.walk.canonical(name): self.checkpoint.shape(name) for name in self.checkpoint.names()}
            chosen = {"embedding": variant.token_embedding_type, "output": variant.output_tensor_type}
            types = {name: value and value.upper() for name, value in chosen.items()}
            plan = gguf.plan(
                self.checkpoint.config_dict(), shapes, file_type, pure=variant.pure, imatrix=solves(variant), **types
            )
            for layer in (layer for index in range(self.walk.count) for layer in self.walk.layer_names(index)):
                if skip and skipped(layer, skip):
                    plan[f"{layer}.weight"] = replace(plan[f"{layer}.weight"], kind="F16")
            self._stored[key] = plan
        return self._stored[key]

    def grid(self, variant: VariantConfig, layer: str = "") -> Grid:
        """The grid of a layer's codes as the variant's container stores it; without a layer, that of most layers."""
        container = CONTAINERS[variant.container]
        if container.file_types:
            kind = self.stored(variant)[f"{layer}.weight"].kind if layer else gguf.main_type(self.file_type(variant))
            return gguf_grid(kind)
        return replace(
            grid_of(variant.solver, layer),
            zero_min=container.zero_min,
            scale_dtype=container.scale_dtype or self.dense_dtype(variant),
        )

    def work(self, *parts: str) -> Path:
        """A path below the folder of intermediate files."""
        return self.directory.joinpath("work", *parts)

    def artifact(self, variant: str) -> Path:
        """The directory of a variant's artifact."""
        return self.directory / "variants" / variant


def skipped(layer: str, patterns: list[str]) -> bool:
    """Whether a layer is a router, or its full name matches one of the regular expressions in ``solver.skip``."""
    return is_router(layer) or any(re.search(pattern, layer) for pattern in patterns)


def solves(variant: VariantConfig) -> bool:
    """Whether a variant's numbers are chosen by a solver here, and not left as they are or to the container."""
    solver, container = SOLVERS[variant.solver.name], CONTAINERS[variant.container]
    return solver.quantizes and solver.container is None and not (container.rounds and not needs_calibration(variant.solver))


def calibration_windows(run: Run) -> Tensor:
    """The windows :func:`calibrate` wrote, int64 ``[samples, tokens]``."""
    with safe_open(run.work("calibration", "windows.safetensors"), "pt") as file:
        windows: Tensor = file.get_tensor("windows")
    return windows


def grid_of(solver: SolverConfig, layer: str = "") -> Grid:
    """The grid of a layer's codes: the first of ``solver.overrides`` that matches its full name, else the variant's."""
    for override in solver.overrides:
        if layer and re.search(override.match, layer):
            return override_grid(solver, override)
    return Grid(solver.bits, solver.group_size, solver.symmetric)


def grids_of(solver: SolverConfig) -> list[Grid]:
    """Every grid a solver's layers may be on."""
    chosen = candidate_grids(solver) if budgeted(solver) else [grid_of(solver)]
    return [*chosen, *(override_grid(solver, override) for override in solver.overrides)]


def needs_calibration(solver: SolverConfig) -> bool:
    """Whether a variant's layers are quantized by what their inputs are, or their bits are chosen by that."""
    return SOLVERS[solver.name].needs_calibration or (
        SOLVERS[solver.name].quantizes and (solver.input_activations == "static" or solver.smoothquant or budgeted(solver))
    )


def override_grid(solver: SolverConfig, override: OverrideConfig) -> Grid:
    """The grid of layers that ``override`` matches: what it leaves open is the solver's.

    Raises:
        InputError: impossible bits or group size.
    """
    return Grid(
        solver.bits if override.bits is None else override.bits,
        solver.group_size if override.group_size is None else override.group_size,
        solver.symmetric if override.symmetric is None else override.symmetric,
    )


def solver_options(config: RunConfig, variant: VariantConfig) -> SolverOptions:
    """The solver's options: fields of the recipe, and what ``quality`` says of those left null."""
    solver, preset = variant.solver, QUALITIES[config.quality]
    blocks = bool(CONTAINERS[variant.container].file_types)  # groups of consecutive columns, whatever their order

    def chosen(name: str) -> Any:
        value = getattr(solver, name)
        return preset[name] if value is None else value

    return SolverOptions(
        desc_act=solver.desc_act,
        static_groups=solver.static_groups or blocks,
        act_group_aware=solver.act_group_aware,
        damp_percent=solver.damp_percent,
        block_size=solver.block_size,
        search_steps=chosen("search_steps"),
        refits=solver.refits,
        gptaq_alpha=chosen("gptaq_alpha") if SOLVERS[solver.name].makes_good else 0.0,
        tune_epochs=chosen("tune_epochs"),
        input_activations=solver.input_activations,
        observer=solver.observer,
        percentile=solver.percentile,
        smoothquant=solver.smoothquant,
        smoothquant_alpha=solver.smoothquant_alpha,
        alpha_steps=solver.alpha_steps,
        search_loss=solver.search_loss,
    )
