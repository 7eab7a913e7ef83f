"""The compressed-tensors container (vLLM's and llm-compressor's format; transformers reads it too).

A layer ``L`` of shape ``[out, in]`` is stored in one of two formats of the ``compressed-tensors`` package:

``int-quantized``, where the layer's inputs are quantized as well (W8A8)::

    L.weight            int8  [out, in]       code - 128
    L.input_scale       [1]                   static activation ranges only: one scale for all inputs, absmax / 127.5

``pack-quantized``, weights only::

    L.weight_packed     int32 [out, ceil(in * bits / 32)]       codes as a little-endian bit stream along the row
    L.weight_shape      int64 [2]                               out, in
    L.weight_zero_point int32 [ceil(out * bits / 32), groups]   asymmetric grids only; packed along the column

and in both ``L.weight_scale [out, groups]`` in the type of the unquantized tensors. Groups are consecutive columns: the package
has no ``g_idx``. ``config.json`` says which layers are how under ``quantization_config`` (``quant_method:
compressed-tensors``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exports.base import Artifact, Container, packed_tensors, stored_quantization, write_config
from exports.packing import pack_rows, to_signed, to_unsigned, unpack_rows, values_per_period
from exports.shards import read_shards, write_shards
from quantize.errors import InputError
from quantize.grids import Grid, QuantizedTensor, group_index

_VERSION = "0.20.0"  # of the format: the package whose reader these bytes were checked with
_FORMATS = ("int-quantized", "pack-quantized")


def check(name: str, out_features: int, in_features: int, grid: Grid) -> None:
    """Raise :class:`InputError` where a layer of this shape cannot be stored in this container on ``grid``."""
    grid.check_divides(name, in_features)


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """Pack along dimension 0, the last word filled up with zeros.

    ``[n, columns]`` to int32 ``[ceil(n * bits / 32), columns]``.
    """
    padding = -len(codes) % values_per_period(bits)
    words = pack_rows(torch.nn.functional.pad(codes, (0, 0, 0, padding)), bits)
    return words[: math.ceil(len(codes) * bits / 32)]


def unpack_columns(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_columns`: uint8 ``[count, columns]``."""
    period = values_per_period(bits) * bits // 32
    padding = -len(packed) % period
    return unpack_rows(torch.nn.functional.pad(packed, (0, 0, 0, padding)), bits)[:count]


def pack(tensor: QuantizedTensor, quantization_format: str) -> dict[str, Tensor]:
    """The stored tensors of one layer, by suffix.

    Raises:
        ValueError: groups that are not consecutive columns, or a grid that ``int-quantized`` cannot hold.
    """
    grid, columns = tensor.grid, tensor.codes.shape[1]
    if not torch.equal(tensor.g_idx, group_index(columns, grid.group_size)):
        raise ValueError("compressed-tensors has no g_idx: groups must be consecutive columns")
    if quantization_format == "int-quantized":
        if grid.bits != 8 or not grid.symmetric:
            raise ValueError(f"int-quantized holds symmetric 8-bit codes, not {grid}")
        stored = {"weight": to_signed(tensor.codes)}
    else:
        stored = {
            "weight_packed": pack_columns(tensor.codes.t(), grid.bits).t().contiguous(),
            "weight_shape": torch.tensor(tensor.codes.shape),
        }
        if not grid.symmetric:
            stored["weight_zero_point"] = pack_columns(tensor.zeros, grid.bits).contiguous()
    stored["weight_scale"] = tensor.scales
    if tensor.input_scale is not None:
        stored["input_scale"] = tensor.input_scale.reshape(1)
    return stored


def unpack(stored: Mapping[str, Tensor], grid: Grid) -> QuantizedTensor:
    """Inverse of :func:`pack`."""
    scales = stored["weight_scale"]
    if "weight" in stored:
        codes = to_unsigned(stored["weight"])
    else:
        columns = int(stored["weight_shape"][1])
        codes = unpack_columns(stored["weight_packed"].t().contiguous(), grid.bits, columns).t().contiguous()
    if "weight_zero_point" in stored:
        zeros = unpack_columns(stored["weight_zero_point"], grid.bits, len(codes))
    else:
        zeros = torch.full(scales.shape, 2 ** (grid.bits - 1), dtype=torch.uint8)
    index = group_index(codes.shape[1], grid.group_size)
    return QuantizedTensor(codes, scales, zeros, index, grid, stored.get("input_scale"))


def format_of(options: Mapping[str, Any]) -> str:
    """Which of the two formats a variant is written in: ``int-quantized`` where inputs are quantized too."""
    return "int-quantized" if options.get("input_activations", "none") != "none" else "pack-quantized"


def quantization_config(artifact: Artifact, ignored: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` entry of config.json; layers on another grid are a group of their own."""
    stored_format = format_of(artifact.options)
    members: dict[Grid, list[str]] = {}
    for layer, grid in artifact.layers.items():
        members.setdefault(grid, []).append(layer)
    several = len(members) > 1
    groups = {}
    for number, (grid, layers) in enumerate(members.items()):
        groups[f"group_{number}"] = {
            "targets": [f"re:^{re.escape(layer)}$" for layer in layers] if several else ["Linear"],
            "weights": _weights(grid),
            "input_activations": _activations(artifact.options),
            "output_activations": None,
            "format": stored_format,
        }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": stored_format,
        "version": _VERSION,
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(grid: Grid) -> dict[str, Any]:
    grouped = grid.group_size != -1
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": grid.group_size if grouped else None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }


def _activations(options: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = options.get("input_activations", "none")
    if kind == "none":
        return None
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
    if kind == "dynamic":
        return {**scheme, "strategy": "token", "dynamic": True, "observer": None}
    return {**scheme, "strategy": "tensor", "dynamic": False, "observer": "minmax"}


def write(directory: Path, artifact: Artifact) -> None:
    """Write weights and ``config.json`` into an existing directory."""
    if artifact.grid is None:
        raise ValueError("a compressed-tensors checkpoint needs the grid of its layers")
    stored_format = format_of(artifact.options)
    write_shards(directory, packed_tensors(artifact, lambda tensor: pack(tensor, stored_format)))
    write_config(directory, artifact, quantization_config(artifact, [*artifact.skipped, *artifact.outside]))


def read(directory: Path) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Read a checkpoint back, ours or llm-compressor's: quantized layers and dense tensors, by name.

    Raises:
        InputError: no or another ``quantization_config``, a format that is not one of the two, or a layer without its scale.
    """
    config = stored_quantization(directory)
    if config.get("quant_method") != "compressed-tensors" or config.get("format") not in _FORMATS:
        formats = " or ".join(_FORMATS)
        raise InputError(f"{directory}/config.json does not describe a compressed-tensors checkpoint in {formats}")
    stored = read_shards(directory)
    layers = sorted(name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale"))
    quantized = {}
    for layer in layers:
        parts = {
            suffix: stored.pop(f"{layer}.{suffix}")
            for suffix in ("weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_scale", "input_scale")
            if f"{layer}.{suffix}" in stored
        }
        if "weight" not in parts and not {"weight_packed", "weight_shape"} <= parts.keys():
            raise InputError(f"{directory}: layer {layer} lacks its weight; the checkpoint is damaged")
        quantized[layer] = unpack(parts, _layer_grid(config, layer, parts["weight_scale"].dtype))
    return quantized, stored


def _layer_grid(config: Mapping[str, Any], layer: str, scale_dtype: torch.dtype) -> Grid:
    groups = list(config["config_groups"].values())
    named = [
        group
        for group in groups
        if any(target.startswith("re:") and re.match(target[3:], layer) for target in group["targets"])
    ]
    weights = (named or groups)[0]["weights"]
    group_size = weights.get("group_size") or -1
    return Grid(weights["num_bits"], group_size, weights["symmetric"], zero_min=0, scale_dtype=scale_dtype)


CONTAINER = Container(quantized=True, check=check, write=write, read=read, quantized_inputs=True)
