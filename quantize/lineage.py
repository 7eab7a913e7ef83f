"""An artifact's description for its manifest: what it is, and everything that decided it.

Only what an artifact depends on is written down, without absolute paths, so that the same artifact made elsewhere has the same
manifest: the calibration and the seed of a variant that is not calibrated are null.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantize.files import sha256_json
from quantize.grids import Grid
from quantize.manifest import versions
from quantize.run import Run, needs_calibration, solver_options, solves
from quantize.solvers import SOLVERS

_WINDOWS = ("source", "text_sha256", "windows", "fingerprint")


def describe(
    run: Run, name: str, loaded: Mapping[str, Any], windows: Mapping[str, Any] | None, exported: Mapping[str, Any]
) -> dict[str, Any]:
    """The description of variant ``name``, for :func:`quantize.artifact.write_manifest`.

    Args:
        run: the run that makes it.
        name: the variant.
        loaded: the result of the load step: the checkpoint's path and its files' hashes.
        windows: the result of the calibrate step; None where there was none.
        exported: ``size_bytes``, ``bits`` and ``bits_per_weight`` of the artifact.
    """
    variant = run.config.variants[name]
    quantizes, calibrated = SOLVERS[variant.solver.name].quantizes, needs_calibration(variant.solver)
    solver = asdict(variant.solver)
    if calibrated:
        options = asdict(solver_options(run.config, variant))
        solver = {key: options.get(key) if value is None else value for key, value in solver.items()}
    return {
        "name": name,
        "container": variant.container,
        "solver": solver if quantizes else {"name": variant.solver.name},
        "grid": _grid(variant.grid, run.grid(variant)) if quantizes and (solves(variant) or variant.grid) else None,
        "quality": run.config.quality if calibrated else None,
        **{key: exported[key] for key in ("bits", "bits_per_weight", "size_bytes")},
        "base": _base(run, loaded),
        "recipe": _recipe(run, name, calibrated),
        "calibration": {key: windows[key] for key in _WINDOWS} if calibrated and windows else None,
        "seed": run.config.seed if calibrated else None,
        "versions": versions(),
    }


def _grid(file_type: str | None, grid: Grid) -> dict[str, Any]:
    """The grid of most layers; ``name`` where it is llama.cpp's type of a file."""
    return {
        "name": file_type,
        "bits": grid.bits,
        "group_size": grid.group_size,
        "symmetric": grid.symmetric,
        "scale_dtype": str(grid.scale_dtype).removeprefix("torch."),
    }


def _base(run: Run, loaded: Mapping[str, Any]) -> dict[str, Any]:
    weights = {file.name for file in run.checkpoint.weight_files()}
    hashes = {file: digest for file, digest in loaded["files"].items() if file in weights}
    return {"name": portable(run.model_path), "license": run.checkpoint.license(), "sha256": sha256_json(hashes)}


def _recipe(run: Run, name: str, calibrated: bool) -> dict[str, Any]:
    """The part of the resolved recipe that decided the variant; paths without their folders."""
    config = run.config
    recipe: dict[str, Any] = {"model": {"path": portable(run.model_path)}}
    if SOLVERS[config.variants[name].solver.name].container is not None or calibrated:
        recipe["device"] = run.device.type
    if calibrated:
        recipe["model"]["compute_dtype"] = config.model.compute_dtype
        calibration = asdict(config.calibration)
        del calibration["activations"]  # where they are kept changes no byte
        calibration["path"] = portable(config.calibration.path) if config.calibration.path else None
        recipe |= {"calibration": calibration, "quality": config.quality, "seed": config.seed}
    variant = asdict(config.variants[name])
    del variant["gate"]  # what is asked of the artifact changes no byte
    return {**recipe, "variants": {name: variant}}


def portable(path: str) -> str:
    """The name by which another machine may know a path: a hub id as it is, anything local without its folders."""
    return Path(path).expanduser().name if Path(path).expanduser().exists() or Path(path).is_absolute() else path
