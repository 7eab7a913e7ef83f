"""What an artifact stores, container by container: its config, its tensors, and codes that stay codes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import exports.awq
import exports.compressed_tensors
import exports.gguf
import exports.gptq
from exports.packing import to_signed
from exports.shards import read_shards
from inference.config import gguf_file
from inference.int4 import Int4Codes, fitted, from_tensor
from inference.quantization import Int8Scheme, int8_scheme
from quantize.errors import InputError
from quantize.files import read_json
from quantize.gguf_checkpoint import GgufCheckpoint
from quantize.grids import QuantizedTensor

_GGUF_INT4 = {"Q4_0", "Q4_1"}


@dataclass
class StoredModel:
    """An artifact in memory, before it is made into layers.

    Attributes:
        config: as in config.json.
        tensors: by transformers' names; a layer is either here as ``NAME.weight`` or in ``int4``.
        scheme: of the int8 codes among them, or None.
        int4: 4-bit layers by name, where they were asked for and can be kept as codes.
        quantized: whether anything is stored in fewer than 16 bits.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    scheme: Int8Scheme | None = None
    int4: dict[str, Int4Codes] = field(default_factory=dict)
    quantized: bool = False


def read_model(path: Path, keep_int4: bool) -> StoredModel:
    """Everything stored in a directory or GGUF file.

    Args:
        path: an artifact.
        keep_int4: leave 4-bit layers as codes where :class:`~inference.int4.Int4Linear` can multiply them.

    Raises:
        InputError: no model, or one of a container or grid the engine does not read.
    """
    file = gguf_file(path)
    if file is not None:
        return _read_gguf(file, keep_int4)
    config = read_json(path / "config.json")
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if not method:
        return StoredModel(config, read_shards(path))
    if method in ("gptq", "awq"):
        layers, tensors = (exports.gptq if method == "gptq" else exports.awq).read(path)
        return _decoded(config, layers, tensors, None, keep_int4)
    if method == "compressed-tensors" and quantization.get("format") == "pack-quantized":
        layers, tensors = exports.compressed_tensors.read(path)
        return _decoded(config, layers, tensors, Int8Scheme(path / "config.json", "none"), keep_int4)
    if method == "compressed-tensors":
        return StoredModel(config, read_shards(path), int8_scheme(path / "config.json", quantization), quantized=True)
    raise InputError(
        f"{path}/config.json: quant_method={method!r} is not read by the engine; it reads gptq, awq, compressed-tensors, "
        "GGUF and unquantized directories"
    )


def _decoded(
    config: dict[str, Any],
    layers: dict[str, QuantizedTensor],
    tensors: dict[str, Tensor],
    scheme: Int8Scheme | None,
    keep_int4: bool,
) -> StoredModel:
    """Layers to weights; symmetric 8-bit codes of a scheme, and 4-bit ones that are to be kept, stay codes."""
    stored = StoredModel(config, tensors, scheme, quantized=True)
    for name, layer in layers.items():
        codes = from_tensor(layer) if keep_int4 else None
        if codes is not None:
            stored.int4[name] = codes
        elif scheme is not None and layer.grid.bits == 8 and layer.grid.symmetric:
            tensors |= {f"{name}.weight": to_signed(layer.codes), f"{name}.weight_scale": layer.scales}
        else:
            tensors[f"{name}.weight"] = layer.dequantize()
    return stored


def _read_gguf(file: Path, keep_int4: bool) -> StoredModel:
    """A GGUF file's tensors in float32, to the bit what llama.cpp's blocks stand for."""
    checkpoint = GgufCheckpoint(file)
    stored = StoredModel(checkpoint.config_dict(), {})
    for name in checkpoint.names():
        kind = checkpoint.kind(name)
        stored.quantized |= kind not in exports.gguf.DENSE_TYPES
        # The embedding is looked up row by row, so it has no use for a packed product.
        if keep_int4 and kind in _GGUF_INT4 and "_proj." in name:
            blocks = (torch.from_numpy(part) for part in checkpoint.blocks(name))
            codes = fitted(Int4Codes(*blocks))
            if codes is not None:
                stored.int4[name.removesuffix(".weight")] = codes
                continue
        stored.tensors[name] = checkpoint.tensor_in(name, torch.float32)
    checkpoint.release()
    return stored
