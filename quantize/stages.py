"""The stages that make artifacts: load, calibrate, quantize, export. They talk through files in the run directory.

Each function takes a :class:`Run`, does one step, and fills its :class:`StepRecord`. Deciding whether a step has to run at all
is :mod:`quantize.pipeline`'s.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from calibration.sources import load_text
from calibration.windows import pack_windows
from exports.base import Artifact
from exports.containers import CONTAINERS
from quantize import __version__
from quantize.block_files import BlockFiles
from quantize.checkpoint import Checkpoint
from quantize.config import VariantConfig
from quantize.errors import InputError
from quantize.files import atomic_directory, files_below, sha256_file, sha256_json, write_tensors
from quantize.grids import Grid
from quantize.logs import progress
from quantize.manifest import StepRecord
from quantize.quantizer import parts_of, quantize_blocks, skipped
from quantize.run import Run
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


def export(run: Run, name: str, record: StepRecord) -> None:
    """Write one variant's artifact, ``variants/NAME``, whole or not at all."""
    variant = run.config.variants[name]
    container = CONTAINERS[variant.container]
    checkpoint = run.checkpoint
    layers = selected_layers(run, variant) if container.quantized else {}
    # What the container's own program quantizes, it gets dense.
    solved = {} if SOLVERS[variant.solver.name].container else layers
    weights = {f"{layer}.weight" for layer in solved}
    everything = [layer for part in parts_of(run, variant) for layer in part] if layers else []
    work = run.work("quantize", name)
    changed = BlockFiles.read_dense(work) if solved else {}

    read = ReleasingReader(checkpoint)

    def dense() -> Iterator[tuple[str, Tensor]]:
        for stored in checkpoint.names():
            canonical = run.walk.canonical(stored) if layers else stored
            if canonical not in weights:
                tensor = changed.pop(canonical) if canonical in changed else read(stored)
                yield canonical, cast(stored, tensor, dtype) if variant.dtype else tensor
        if changed:
            raise ValueError(f"tuned tensors that the checkpoint does not have: {', '.join(changed)}")

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
        },
    )
    with atomic_directory(run.artifact(name)) as directory:
        container.write(directory, artifact)
        checkpoint.copy_side_files(directory)
    record.files = files_below(run.artifact(name))
    weight_bytes = sum(file.stat().st_size for file in record.files if file.suffix == ".safetensors")
    record.result = {
        "size_bytes": weight_bytes,
        "bits": variant.solver.bits if layers else torch.finfo(dtype).bits,
        "bits_per_weight": 8 * weight_bytes / checkpoint.num_parameters(),
        "quantized_layers": len(layers),
    }


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
