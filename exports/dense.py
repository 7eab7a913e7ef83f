"""The unquantized container: a Hugging Face directory of safetensors, tensors as the checkpoint has them."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from exports.base import Artifact, Container, write_config
from exports.shards import read_shards, write_shards
from quantize.grids import Grid, QuantizedTensor


def check(name: str, out_features: int, in_features: int, grid: Grid) -> None:
    """Every dense layer can be stored; nothing to check."""


def write(directory: Path, artifact: Artifact) -> None:
    """Write weights and config into an existing directory."""
    write_shards(directory, artifact.dense)
    write_config(directory, artifact)


def read(directory: Path) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Read every tensor back; no layer is quantized."""
    return {}, read_shards(directory)


CONTAINER = Container(quantized=False, check=check, write=write, read=read)
