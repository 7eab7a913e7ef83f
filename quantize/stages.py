"""The stages that make artifacts: load, calibrate, quantize, export. They talk through files in the run directory.

Each function takes a :class:`Run`, does one step, and fills its :class:`StepRecord`. Deciding whether a step has to run at all
is :mod:`quantize.pipeline`'s.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calibration.sources import load_text
from calibration.windows import pack_windows
from exports import gguf, gguf_types
from exports.base import Artifact
from exports.containers import CONTAINERS
from quantize import __version__
from quantize.artifact import write_manifest
from quantize.block_files import BlockFiles
from quantize.checkpoint import Checkpoint
from quantize.choices import budgeted
from quantize.config import VariantConfig
from quantize.errors import InputError
from quantize.files import atomic_directory, files_below, sha256_file, sha256_json, write_tensors
from quantize.grids import Grid
from quantize.lineage import describe
from quantize.logs import progress
from quantize.manifest import StepRecord
from quantize.quantizer import parts_of, quantize_blocks
from quantize.run import Run, skipped, solves
from quantize.solvers import SOLVERS

log = logging.getLogger(__name__)

_MAPPED_BYTES = 32 * 2**20
_CHECKED_AT_ONCE = 2**20  # numbers


class ReleasingReader:
    """Reads a checkpoint's tensors in passing: what was read is unmapped again every few megabytes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._bytes = checkpoint, 0

    def __call__(self, name: str) -> Tensor:
        """The tensor ``name``; use it before the next call."""
        if self._bytes > _MAPPED_BYTES:
            self._checkpoint.release()
            self._bytes = 0
        tensor = self._checkpoint.tensor(name)
        self._bytes += tensor.numel() * tensor.element_size()
        return tensor


def load(run: Run, record: StepRecord) -> None:
    """Read the checkpoint once: hash its files, refuse NaN and infinity, and check that the tokenizer fits.

    Raises:
        InputError: damaged or unusable checkpoint.
    """
    checkpoint = run.checkpoint
    stored_bytes = 0
    read = ReleasingReader(checkpoint)
    for name in progress(checkpoint.names(), "load"):
        tensor = read(name)
        if not all(bool(torch.isfinite(part).all()) for part in torch.split(tensor.reshape(-1), _CHECKED_AT_ONCE)):
            raise InputError(f"{checkpoint.path}: tensor {name} holds NaN or infinity; the checkpoint is damaged")
        stored_bytes += tensor.numel() * tensor.element_size()
    _check_vocabulary(run)
    files = {file.name: sha256_file(file) for file in checkpoint.fingerprint_files()}
    checkpoint.release()
    record.result = {
        "path": run.model_path,
        "model_type": checkpoint.config.model_type,
        "parameters": checkpoint.num_parameters(),
        "bytes": stored_bytes,
        "files": files,
        "fingerprint": sha256_json(files),
    }


def _check_vocabulary(run: Run) -> None:
    tokenizer = run.checkpoint.tokenizer()
    rows = run.checkpoint.config.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise InputError(
            f"{run.checkpoint.path}: the tokenizer knows token id {largest}, but the embedding has only {rows} rows; "
            "the tokenizer belongs to another model"
        )


def calibrate(run: Run, record: StepRecord) -> None:
    """Choose and tokenise the calibration windows: ``work/calibration/windows.safetensors``, int64 ``[samples, tokens]``.

    Raises:
        InputError: the text is missing, empty or too short.
    """
    config = run.config.calibration
    needed = config.num_samples * config.seq_len
    part = load_text(
        config.source,
        "train",
        path=config.path,
        heldout_fraction=config.heldout_fraction,
        # Streamed data sets end here: 8 characters a token are more than any tokenizer needs on prose.
        max_characters=None if config.source in ("builtin", "text") else 8 * needed,
    )
    windows = pack_windows(
        run.checkpoint.tokenizer(),
        part,
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        seed=run.config.seed,
        chat_template=config.chat_template,
        vocab_size=run.checkpoint.config.get_text_config().vocab_size,
    )
    path = run.work("calibration", "windows.safetensors")
    write_tensors(path, {"windows": windows})
    record.files = [path]
    record.result = {
        "source": config.source,
        "path": config.path,
        "text_sha256": part.sha256,
        "windows": list(windows.shape),
        "fingerprint": sha256_file(path),
    }


def selected_layers(run: Run, variant: VariantConfig) -> dict[str, Grid]:
    """The linear layers that ``variant`` quantizes, in order, and the grid of each.

    Raises:
        InputError: one of them cannot be stored in the variant's container on its grid, or an override matches no layer.
    """
    layers = {}
    for part in parts_of(run, variant):
        for name, (rows, columns) in part.items():
            if not skipped(name, variant.solver.skip):
                layers[name] = run.grid(variant, name)
                CONTAINERS[variant.container].check(name, rows, columns, layers[name])
    for override in variant.solver.overrides:
        if not any(re.search(override.match, name) for name in layers):
            raise InputError(
                f"solver.overrides: match={override.match} matches no quantized layer, such as {next(iter(layers))}"
            )
    return layers


def quantize(run: Run, name: str, key: str, record: StepRecord) -> None:
    """Quantize one variant block by block into ``work/quantize/NAME``, going on from the last finished block."""
    variant = run.config.variants[name]
    selected_layers(run, variant)  # refuses what cannot be stored before any work is done
    files = BlockFiles(run.work("quantize", name), key, len(parts_of(run, variant)))
    started = time.perf_counter()
    quantize_blocks(run, variant, files)
    record.earlier_seconds = files.earlier_seconds(started)
    record.files = files.finish()


def export(run: Run, name: str, loaded: Mapping[str, Any], windows: Mapping[str, Any] | None, record: StepRecord) -> None:
    """Write one variant's artifact, ``variants/NAME``, and its manifest, whole or not at all.

    ``loaded`` and ``windows`` are the results of the load step and of the calibrate step, for the manifest.
    """
    variant = run.config.variants[name]
    container = CONTAINERS[variant.container]
    checkpoint = run.checkpoint
    quantizes = SOLVERS[variant.solver.name].quantizes and not container.rounds
    layers = selected_layers(run, variant) if quantizes or solves(variant) else {}
    # What the container or its own program quantizes, it gets dense.
    solved = layers if solves(variant) else {}
    weights = {f"{layer}.weight" for layer in solved}
    everything = [layer for part in parts_of(run, variant) for layer in part] if layers else []
    work = run.work("quantize", name)
    changed = BlockFiles.read_dense(work) if solved else {}

    read = ReleasingReader(checkpoint)
    planned = run.stored(variant) if container.file_types else {}
    named = {run.walk.canonical(stored) if layers or planned else stored: stored for stored in checkpoint.names()}
    if unknown := changed.keys() - named.keys():
        raise ValueError(f"changed tensors that the checkpoint does not have: {', '.join(unknown)}")

    def tensor(canonical: str) -> Tensor:
        found = changed[canonical] if canonical in changed else read(named[canonical])
        return cast(canonical, found, dtype) if variant.dtype else found

    def dense() -> Iterator[tuple[str, Tensor]]:
        yield from ((canonical, tensor(canonical)) for canonical in named if canonical not in weights)

    solver, config, dtype = asdict(variant.solver), checkpoint.config_dict(), run.dense_dtype(variant)
    if variant.dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = variant.dtype
    if variant.solver.lm_head and layers:
        config["tie_word_embeddings"] = False  # the output embedding now has numbers of its own
    artifact = Artifact(
        config=config,
        dense=dense(),
        quantized=BlockFiles.read_all(work, layers) if solved else (),
        grid=run.grid(variant) if layers else None,
        layers=layers,
        skipped=tuple(layer for layer in everything if layer not in layers),
        outside=() if variant.solver.lm_head or not layers else tuple(run.walk.head()),
        options={
            **solver,
            "quantizer": f"quantize:{__version__}",
            "device": str(run.device),
            "desc_act": solver["desc_act"] and "gptq" in solver["name"],
            "file_type": run.file_type(variant) if planned else None,
        },
        stored=planned,
        tensor=tensor,
        layer=BlockFiles.reader(work, solved),
    )
    with atomic_directory(run.artifact(name)) as directory, tempfile.TemporaryDirectory() as side:
        checkpoint.copy_side_files(Path(side) if container.complete else directory)
        container.write(directory, replace(artifact, tokenizer=Path(side)) if container.complete else artifact)
        weight_bytes = sum(file.stat().st_size for file in files_below(directory) if file.suffix in (".safetensors", ".gguf"))
        record.result = {
            "size_bytes": weight_bytes,
            "bits": _bits(run, variant, layers),
            "bits_per_weight": 8 * weight_bytes / checkpoint.num_parameters(),
            "quantized_layers": len(layers),
        }
        write_manifest(directory, describe(run, name, loaded, windows, record.result))
    record.files = files_below(run.artifact(name))


def _bits(run: Run, variant: VariantConfig, layers: Mapping[str, Grid]) -> float:
    """Nominal bits of the quantized layers; where they were allocated, the mean over weights."""
    if CONTAINERS[variant.container].file_types:
        kind = gguf_types.TYPES[gguf.main_type(run.file_type(variant))]
        return kind.bits or 8 * kind.type_size
    if layers and budgeted(variant.solver):
        sizes = {name: rows * columns for part in parts_of(run, variant) for name, (rows, columns) in part.items()}
        return round(sum(layers[name].bits * sizes[name] for name in layers) / sum(sizes[name] for name in layers), 2)
    return variant.solver.bits if layers else torch.finfo(run.dense_dtype(variant)).bits


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in another type.

    Raises:
        InputError: a finite value is infinite there.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if bool(torch.isinf(result).any()):
        raise InputError(f"tensor {name} has values up to {float(tensor.abs().max()):.3g}, beyond {dtype}; use dtype=bfloat16")
    return result
