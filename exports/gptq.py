"""The GPTQ checkpoint container (as AutoGPTQ writes it and transformers, GPTQModel and vLLM read it).

Each quantized layer ``L`` of shape ``[out, in]`` is stored as::

    L.qweight  int32   [in * bits / 32, out]      codes, packed along the input dimension (see exports.packing)
    L.qzeros   int32   [groups, out * bits / 32]  zero_point - 1 (format v2: zero_point), packed along the output dimension
    L.scales   float16 [groups, out]
    L.g_idx    int32   [in]                       group of each input column

``config.json`` carries ``quantization_config`` with ``quant_method: gptq``; the same fields go to ``quantize_config.json``,
where AutoGPTQ looks. All other tensors are stored as the source checkpoint has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exports.base import Artifact, Container, packed_tensors, stored_quantization, write_config
from exports.packing import pack_rows, unpack_rows, values_per_period
from exports.shards import read_shards, write_shards
from quantize.errors import InputError
from quantize.grids import Grid, QuantizedTensor

SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")


def check(name: str, out_features: int, in_features: int, grid: Grid) -> None:
    """Raise :class:`InputError` where a layer of this shape cannot be stored in this container on ``grid``."""
    grid.check_divides(name, in_features)
    period = values_per_period(grid.bits)
    for label, size in (("in_features", in_features), ("out_features", out_features)):
        if size % period:
            raise InputError(
                f"{label}={size} of {name} is not a multiple of {period}, as {grid.bits}-bit GPTQ packing needs; "
                f"skip the layer (solver.skip) or use another container"
            )


def pack(tensor: QuantizedTensor, version: int = 1) -> dict[str, Tensor]:
    """The four stored tensors of one layer, by suffix (``qweight``, ``qzeros``, ``scales``, ``g_idx``)."""
    if version == 1 and bool((tensor.zeros < 1).any()):
        raise ValueError("zero points below 1 cannot be stored in GPTQ v1: zero_point - 1 would borrow from its neighbour")
    bits = tensor.grid.bits
    stored_zeros = tensor.zeros - 1 if version == 1 else tensor.zeros
    return {
        "qweight": pack_rows(tensor.codes.t().contiguous(), bits),
        "qzeros": pack_rows(stored_zeros.contiguous(), bits).t().contiguous(),
        "scales": tensor.scales.t().contiguous().to(torch.float16),
        "g_idx": tensor.g_idx.to(torch.int32),
    }


def unpack(stored: Mapping[str, Tensor], grid: Grid, version: int = 1) -> QuantizedTensor:
    """Inverse of :func:`pack`."""
    zeros = unpack_rows(stored["qzeros"].t().contiguous(), grid.bits)
    return QuantizedTensor(
        codes=unpack_rows(stored["qweight"], grid.bits).t().contiguous(),
        scales=stored["scales"].t().contiguous(),
        zeros=zeros + 1 if version == 1 else zeros,
        g_idx=stored["g_idx"].to(torch.int32),
        grid=grid,
    )


def format_version(layers: Mapping[str, Grid], grid: Grid, options: Mapping[str, Any]) -> int:
    """1, which everything reads, unless GPTQModel's own loader is needed and a grid is asymmetric.

    That loader (mixed grids, ``lm_head``, experts) trusts asymmetric v1 files of nobody but itself; v2, which stores zero
    points as they are, it takes from anyone.
    """
    own = options.get("lm_head") or any(other != grid or ".experts." in name for name, other in layers.items())
    return 2 if own and not all(other.symmetric for other in layers.values()) else 1


def quantization_config(
    grid: Grid, options: Mapping[str, Any], skipped: Sequence[str] = (), layers: Mapping[str, Grid] | None = None
) -> dict[str, Any]:
    """The ``quantization_config`` entry of config.json.

    Args:
        grid: the grid of every quantized layer that ``layers`` does not put on another.
        options: solver facts worth recording, by the names of the recipe's fields.
        skipped: full names of linear layers inside the blocks that stay dense.
        layers: the grid of every quantized layer, by full name.
    """
    layers = layers or {}
    quantization: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if format_version(layers, grid, options) == 1 else "gptq_v2",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": grid.symmetric,
        "desc_act": bool(options.get("desc_act", False)),
        "static_groups": bool(options.get("static_groups", False)),
        "true_sequential": bool(options.get("true_sequential", True)),
        "damp_percent": float(options.get("damp_percent", 0.01)),
        "lm_head": bool(options.get("lm_head", False)),
        "pack_dtype": "int32",
        "meta": {"quantizer": [options.get("quantizer", "quantize")]},
    }
    # GPTQModel and vLLM read "dynamic": "+:" patterns name layers on another grid, "-:" patterns layers to leave alone.
    dynamic: dict[str, dict[str, Any]] = {
        f"+:^{re.escape(layer)}$": {"bits": other.bits, "group_size": other.group_size, "sym": other.symmetric}
        for layer, other in layers.items()
        if other != grid
    }
    if skipped:
        dynamic |= {f"-:^{re.escape(name)}$": {} for name in skipped}
        # Transformers quantizes only layers whose name ends in one of those listed, and full names say exactly which.
        quantization["modules_in_block_to_quantize"] = [list(layers)]
    if dynamic:
        quantization["dynamic"] = dynamic
    return quantization


def write(directory: Path, artifact: Artifact) -> None:
    """Write weights, ``config.json`` and ``quantize_config.json`` into an existing directory."""
    if artifact.grid is None:
        raise ValueError("a GPTQ checkpoint needs the grid of its layers")
    version = format_version(artifact.layers, artifact.grid, artifact.options)
    write_shards(directory, packed_tensors(artifact, lambda tensor: pack(tensor, version)))
    quantization = quantization_config(artifact.grid, artifact.options, artifact.skipped, artifact.layers)
    write_config(directory, artifact, quantization)
    (directory / "quantize_config.json").write_text(json.dumps(quantization, indent=2) + "\n")


def read(directory: Path) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Read a GPTQ checkpoint back, ours or another program's: quantized layers and dense tensors, by name.

    Raises:
        InputError: no or another ``quantization_config``, or a layer lacks one of its tensors.
    """
    config = _stored_config(directory)
    stored = read_shards(directory)
    layers = sorted(name.removesuffix(".qweight") for name in stored if name.endswith(".qweight"))
    quantized = {}
    for layer in layers:
        missing = [suffix for suffix in SUFFIXES if layer + suffix not in stored]
        if missing:
            raise InputError(f"{directory}: layer {layer} lacks {', '.join(missing)}; the checkpoint is damaged")
        parts = {suffix[1:]: stored.pop(layer + suffix) for suffix in SUFFIXES}
        version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
        quantized[layer] = unpack(parts, layer_grid(config, layer), version)
    return quantized, stored


def _stored_config(directory: Path) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, or AutoGPTQ's own ``quantize_config.json``, which names no method."""
    config = stored_quantization(directory)
    own = directory / "quantize_config.json"
    if not config and own.exists():
        config = {"quant_method": "gptq", **json.loads(own.read_text())}
    if config.get("quant_method") != "gptq" or config.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        raise InputError(f"{directory}/config.json does not describe a GPTQ checkpoint (quant_method=gptq)")
    for key in ("bits", "group_size"):
        if not isinstance(config.get(key), int):
            raise InputError(f"{directory}: the quantization_config has no {key}; a GPTQ checkpoint names bits and group_size")
    return config


def layer_grid(config: Mapping[str, Any], layer: str) -> Grid:
    """A layer's grid by a ``quantization_config``: its first matching ``dynamic`` rule, else the general fields."""
    rules: Mapping[str, Any] = {}
    for pattern, found in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), layer):
            rules = found
            break
    merged = {**config, **rules}
    return Grid(bits=merged["bits"], group_size=merged["group_size"], symmetric=merged.get("sym", True))


CONTAINER = Container(
    quantized=True,
    check=check,
    write=write,
    read=read,
    scale_dtype=torch.float16,
    zero_min=1,  # v1 stores zero_point - 1
    shuffled_groups=True,
)
