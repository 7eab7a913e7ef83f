"""One run: the recipe, its directory, and what the stages share."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from quantize.blocks import DecoderWalk
from quantize.checkpoint import Checkpoint, open_checkpoint
from quantize.config import RunConfig, VariantConfig
from quantize.devices import resolve_compute_dtype, resolve_device
from quantize.grids import Grid


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

    def __post_init__(self) -> None:
        self.device = resolve_device(self.config.device)

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, opened once."""
        return open_checkpoint(self.model_path)

    @functools.cached_property
    def walk(self) -> DecoderWalk:
        """The block walk over the checkpoint, built once."""
        stored = self.checkpoint.dtype(self.checkpoint.names()[0])
        dtype = resolve_compute_dtype(self.config.model.compute_dtype, self.device, stored)
        return DecoderWalk(self.checkpoint, self.device, dtype)

    def work(self, *parts: str) -> Path:
        """A path below the folder of intermediate files."""
        return self.directory.joinpath("work", *parts)

    def artifact(self, variant: str) -> Path:
        """The directory of a variant's artifact."""
        return self.directory / "variants" / variant


def calibration_windows(run: Run) -> Tensor:
    """The windows :func:`calibrate` wrote, int64 ``[samples, tokens]``."""
    with safe_open(run.work("calibration", "windows.safetensors"), "pt") as file:
        windows: Tensor = file.get_tensor("windows")
    return windows


def grid_of(variant: VariantConfig) -> Grid:
    """The grid a variant's codes live on."""
    return Grid(variant.solver.bits, variant.solver.group_size, variant.solver.symmetric)
