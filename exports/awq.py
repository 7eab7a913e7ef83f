"""The AWQ checkpoint container, version "GEMM" (as AutoAWQ writes it and transformers, vLLM and GPTQModel read it).

Each quantized layer ``L`` of shape ``[out, in]`` is stored as::

    L.qweight  int32   [in, out / 8]      codes, eight outputs in a word
    L.qzeros   int32   [groups, out / 8]  zero points, likewise
    L.scales   float16 [groups, out]

Output ``8 k + ORDER[i]`` is in bits ``4 i .. 4 i + 3`` of word ``k``, ``ORDER = 0 2 4 6 1 3 5 7``: AutoAWQ's kernels take
the even outputs of a word with one mask and the odd ones with another. Groups are consecutive columns. ``config.json`` carries
``quantization_config`` with ``quant_method: awq``. All other tensors are stored as the source checkpoint has them, norms and
biases divided where scales were folded into them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exports.base import Artifact, Container, packed_tensors, stored_quantization, write_config
from exports.packing import pack_rows, unpack_rows
from exports.shards import read_shards, write_shards
from quantize.errors import InputError
from quantize.grids import Grid, QuantizedTensor, group_index

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SUFFIXES = (".qweight", ".qzeros", ".scales")
_WORD = len(ORDER)


def check(name: str, out_features: int, in_features: int, grid: Grid) -> None:
    """Raise :class:`InputError` where a layer of this shape cannot be stored in this container on ``grid``."""
    if grid.bits != BITS:
        raise InputError(f"bits={grid.bits} of {name} cannot be stored in an AWQ checkpoint; use solver.bits=4")
    grid.check_divides(name, in_features)
    if out_features % _WORD:
        raise InputError(
            f"out_features={out_features} of {name} is not a multiple of {_WORD}, as AWQ packing needs; skip the layer "
            "(solver.skip) or use container compressed-tensors"
        )


def pack_outputs(codes: Tensor) -> Tensor:
    """Pack along dimension 1, eight codes of 4 bits in a word: integer ``[n, out]`` to int32 ``[n, out / 8]``."""
    order = torch.tensor(ORDER)
    interleaved = codes.reshape(len(codes), -1, _WORD)[..., order].flatten(1)
    return pack_rows(interleaved.t().contiguous(), BITS).t().contiguous()


def unpack_outputs(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_outputs`: uint8 ``[n, out]``."""
    place = torch.argsort(torch.tensor(ORDER))
    codes = unpack_rows(packed.t().contiguous(), BITS).t()
    return codes.reshape(len(packed), -1, _WORD)[..., place].flatten(1).contiguous()


def pack(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The three stored tensors of one layer, by suffix (``qweight``, ``qzeros``, ``scales``).

    Raises:
        ValueError: groups are not consecutive columns.
    """
    if not torch.equal(tensor.g_idx.cpu(), group_index(tensor.codes.shape[1], tensor.grid.group_size)):
        raise ValueError("an AWQ checkpoint has no g_idx: groups must be consecutive columns")
    return {
        "qweight": pack_outputs(tensor.codes.t()),
        "qzeros": pack_outputs(tensor.zeros.t()),
        "scales": tensor.scales.t().contiguous().to(torch.float16),
    }


def unpack(stored: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
    """Inverse of :func:`pack`."""
    codes = unpack_outputs(stored["qweight"]).t().contiguous()
    return QuantizedTensor(
        codes=codes,
        scales=stored["scales"].t().contiguous(),
        zeros=unpack_outputs(stored["qzeros"]).t().contiguous(),
        g_idx=group_index(codes.shape[1], grid.group_size),
        grid=grid,
    )


def quantization_config(grid: Grid, skipped: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` entry of config.json; ``skipped`` are layers that stay dense, by full name.

    A symmetric grid's zero points, all 8, are stored like any others: no program reads GEMM checkpoints without them.
    """
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "zero_point": True,
        "modules_to_not_convert": list(skipped) or None,
    }


def write(directory: Path, artifact: Artifact) -> None:
    """Write weights and ``config.json`` into an existing directory."""
    if artifact.grid is None:
        raise ValueError("an AWQ checkpoint needs the grid of its layers")
    write_shards(directory, packed_tensors(artifact, pack))
    write_config(directory, artifact, quantization_config(artifact.grid, [*artifact.skipped, *artifact.outside]))


def read(directory: Path) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Read an AWQ checkpoint back, ours or AutoAWQ's: quantized layers and dense tensors, by name.

    Raises:
        InputError: no or another ``quantization_config``, or a layer lacks one of its tensors.
    """
    config = stored_quantization(directory)
    version = str(config.get("version", "gemm")).lower()
    if config.get("quant_method") != "awq" or version != "gemm" or config.get("bits", BITS) != BITS:
        raise InputError(f"{directory}/config.json does not describe a 4-bit AWQ checkpoint of version gemm (quant_method=awq)")
    grid = Grid(BITS, int(config.get("group_size", 128)), symmetric=False, zero_min=0)
    stored, quantized = read_shards(directory), {}
    for layer in sorted(name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")):
        missing = [suffix for suffix in SUFFIXES if layer + suffix not in stored]
        if missing:
            raise InputError(f"{directory}: layer {layer} lacks {', '.join(missing)}; the checkpoint is damaged")
        quantized[layer] = unpack({suffix[1:]: stored.pop(layer + suffix) for suffix in SUFFIXES}, grid)
    return quantized, stored


CONTAINER = Container(
    quantized=True,
    check=check,
    write=write,
    read=read,
    scale_dtype=torch.float16,
    mixed_grids=False,  # one bits and one group_size for all layers
    head=False,  # transformers always leaves the output embedding dense
)
