"""What every container is: a check, a writer, a reader."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.grids import Grid, QuantizedTensor


def _nothing(name: str) -> Any:
    raise KeyError(name)


@dataclass(frozen=True)
class Artifact:
    """What a container writes; tensors are streamed.

    Attributes:
        config: the model's Hugging Face config.
        dense: ``(name, tensor)`` of everything not quantized, in the checkpoint's own types.
        quantized: ``(layer name, tensor)`` of every quantized layer.
        grid: the grid of most quantized layers; None where nothing is quantized.
        skipped: linear layers inside decoder blocks that were left unquantized.
        options: solver facts worth recording in the artifact, by the names of the recipe's fields, and ``quantizer``.
        layers: the grid of every quantized layer, by full name (``quantized`` is a stream and can be read only once).
        outside: linear layers outside the decoder blocks that stay dense (the output embedding).
        stored: where a container with a plan of its own (GGUF) puts each tensor, by name, in the file's order.
        tensor: any one of ``dense``, by name, for containers with an order of their own.
        layer: any one of ``quantized``, likewise.
        tokenizer: a directory with the tokenizer's files, for containers that hold the tokenizer too.
    """

    config: Mapping[str, Any]
    dense: Iterable[tuple[str, Tensor]]
    quantized: Iterable[tuple[str, QuantizedTensor]]
    grid: Grid | None
    skipped: tuple[str, ...]
    options: Mapping[str, Any]
    layers: Mapping[str, Grid] = field(default_factory=dict)
    outside: tuple[str, ...] = ()
    stored: Mapping[str, Any] = field(default_factory=dict)
    tensor: Callable[[str], Tensor] = _nothing
    layer: Callable[[str], QuantizedTensor] = _nothing
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Container:
    """A registry entry.

    Attributes:
        quantized: whether it holds quantized layers or only dense tensors.
        check: ``(layer name, out_features, in_features, grid)``; raises InputError where the layer cannot be stored.
        write: writes the model files (not the tokenizer) into an existing directory, which the caller makes atomic.
        read: gives quantized layers and dense tensors back, by name.
        scale_dtype: the type of scales; None: that of the dense tensors.
        zero_min: the smallest zero point it can store.
        shuffled_groups: whether columns of one group may lie anywhere in the layer (``g_idx``).
        quantized_inputs: whether it can say that a layer's inputs are quantized too.
        mixed_grids: whether layers may be on different grids.
        head: whether the output embedding may be quantized by a solver.
        dense: whether it also holds models of which nothing is quantized.
        rounds: whether it rounds to nearest itself, by its format's own arithmetic; a solver then only calibrates.
        file_types: the files it can make, each a grid for every layer (``variants.NAME.grid``); none where grids are free.
        complete: whether what it writes holds the tokenizer and everything else a consumer needs.
    """

    quantized: bool
    check: Callable[[str, int, int, Grid], None]
    write: Callable[[Path, Artifact], None]
    read: Callable[[Path], tuple[dict[str, QuantizedTensor], dict[str, Tensor]]]
    scale_dtype: torch.dtype | None = None
    zero_min: int = 0
    shuffled_groups: bool = False
    quantized_inputs: bool = False
    mixed_grids: bool = True
    head: bool = True
    dense: bool = False
    rounds: bool = False
    file_types: tuple[str, ...] = ()
    complete: bool = False


def packed_tensors(artifact: Artifact, pack: Callable[[QuantizedTensor], Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of an artifact as they are stored; ``pack`` gives those of a layer, by suffix."""
    yield from artifact.dense
    for layer, tensor in artifact.quantized:
        for suffix, stored in pack(tensor).items():
            yield f"{layer}.{suffix}", stored


def write_config(directory: Path, artifact: Artifact, quantization: Mapping[str, Any] | None = None) -> None:
    """Write ``config.json``: the model's config and, for quantized layers, its ``quantization_config``."""
    config = {**artifact.config, **({"quantization_config": quantization} if quantization else {})}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def stored_quantization(directory: Path) -> dict[str, Any]:
    """The ``quantization_config`` of a directory's ``config.json``; empty where there is none."""
    return json.loads((directory / "config.json").read_text()).get("quantization_config") or {}
