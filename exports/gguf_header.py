"""The header of a quantized GGUF file, as ``llama-quantize`` writes it.

The format is ggml's ``docs/gguf.md``; the order of keys and tensors is that of llama.cpp's ``src/llama-quant.cpp``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from exports.gguf_layout import TYPES
from exports.gguf_mix import in_order
from quantize.gguf_header import TENSOR_KINDS
from quantize.gguf_reader import GgufReader, GgufTensorInfo

_VERSION = 3
# GGML_QNT_VERSION: the version of the block formats.
_QUANTIZATION_VERSION = 2
_UINT32 = 4
# Set anew, and what says that a file is one of several.
_DROPPED = ("general.quantization_version", "general.file_type", "split.no", "split.count", "split.tensors.count")
_NUMBERS = {name: number for number, (name, _, _) in TENSOR_KINDS.items()}


@dataclass(frozen=True)
class Plan:
    """A file to be written.

    Attributes:
        header: its bytes up to the first tensor.
        offsets: where each tensor begins, in bytes from the beginning of the file, in the order of the file.
        nbytes: bytes of each tensor.
        size: bytes of the whole file.
    """

    header: bytes
    offsets: dict[str, int]
    nbytes: dict[str, int]
    size: int


def plan_file(reader: GgufReader, kinds: Mapping[str, str], file_type: int) -> Plan:
    """The metadata of ``reader``'s file and its tensors in other types.

    Args:
        reader: the file that is quantized.
        kinds: type of every tensor by name.
        file_type: value of ``general.file_type``.
    """
    keys = [key for key in reader.fields if key not in _DROPPED]
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(kinds), len(keys) + 2)]
    parts += [_text(key) + reader.encoded(key) for key in keys]
    for key, value in (("general.quantization_version", _QUANTIZATION_VERSION), ("general.file_type", file_type)):
        parts.append(_text(key) + struct.pack("<II", _UINT32, value))
    offsets, nbytes, position = {}, {}, 0
    for name in in_order(list(kinds)):
        info = reader.tensors[name]
        offsets[name], nbytes[name] = position, _nbytes(info, kinds[name])
        parts.append(_tensor(info, _NUMBERS[kinds[name]], position))
        position = _aligned(position + nbytes[name], reader.alignment)
    header = b"".join(parts)
    header += bytes(_aligned(len(header), reader.alignment) - len(header))
    return Plan(header, {name: len(header) + offset for name, offset in offsets.items()}, nbytes, len(header) + position)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _tensor(info: GgufTensorInfo, number: int, offset: int) -> bytes:
    dimensions = list(info.shape[::-1])
    while len(dimensions) > 1 and dimensions[-1] == 1:
        dimensions.pop()
    return _text(info.name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, number, offset)


def _nbytes(info: GgufTensorInfo, kind: str) -> int:
    if kind == info.kind:
        return info.nbytes
    return int(np.prod(info.shape[:-1], dtype=np.int64)) * TYPES[kind].row_bytes(info.shape[-1])


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
