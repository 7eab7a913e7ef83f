"""What an artifact's weight files hold, read from their headers alone: tensors as stored, and the layers they make up.

Formats: safetensors (https://github.com/huggingface/safetensors, "Format") and, through :mod:`quantize.gguf_reader`, GGUF. No
torch, and no data is read but two numbers a layer where compressed-tensors keeps a packed layer's shape.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import InputError, one_line
from quantize.gguf_reader import GgufReader

_HEADER_BYTES = 100_000_000  # at most, as the safetensors package has it
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}
_BITS |= {"C64": 64}
_PARTS = (
    *("qweight", "qzeros", "scales", "g_idx"),  # GPTQ, AWQ
    *(
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
        "input_scale",
    ),  # compressed-tensors
    *(
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        "SCB",
        "weight_format",
    ),  # bitsandbytes
    *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file holds it: ``shape`` in numpy's order, ``offset`` from the file's beginning and ``nbytes`` in bytes."""

    name: str
    file: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Layer:
    """A weight and all tensors that make it up.

    ``kind``: how its weights are stored, such as ``I4 (gptq)``, ``Q4_0`` or ``F16``. ``bits``: of one code. ``weights``: how
    many there are. ``nbytes``: of all its tensors, scales and zero points too: 8 * nbytes / weights is what a weight takes.
    """

    name: str
    kind: str
    bits: float
    weights: int
    nbytes: int


def stored_tensors(files: Mapping[str, Path]) -> list[StoredTensor]:
    """All tensors of an artifact's files (their paths by name in the artifact), file by file.

    Raises:
        InputError: a header is damaged: the message names file and fault.
    """
    found = []
    for name in sorted(files):
        if name.endswith(".safetensors"):
            found += _read_safetensors(files[name], name)
        elif name.endswith(".gguf"):
            reader = GgufReader(files[name])
            found += [StoredTensor(t.name, name, t.kind, t.shape, t.offset, t.nbytes) for t in reader.tensors.values()]
    return found


def _read_safetensors(path: Path, name: str) -> list[StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_HEADER_BYTES, size - 8):
            raise InputError(
                f"{name} is no safetensors file: its header would have {length} of its {size} bytes; fetch it again"
            )
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = [_safetensors_entry(key, record, name, 8 + length, size) for key, record in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{name} has a damaged header ({one_line(error)}); fetch it again") from error
    return sorted(tensors, key=lambda tensor: (tensor.offset, tensor.name))


def _safetensors_entry(key: str, record: Mapping[str, Any], file: str, start: int, size: int) -> StoredTensor:
    kind, shape, (begin, end) = record["dtype"], tuple(record["shape"]), record["data_offsets"]
    if kind not in _BITS or not all(isinstance(each, int) and each >= 0 for each in (*shape, begin, end)):
        raise ValueError(f"{key} has type {kind!r} and shape {shape}")
    if not begin <= end <= size - start or (end - begin) * 8 != math.prod(shape) * _BITS[kind]:
        raise ValueError(f"{key} of {kind} {list(shape)} cannot lie at bytes {begin} to {end}")
    return StoredTensor(key, file, kind, shape, start + begin, end - begin)


def layers(tensors: list[StoredTensor], files: Mapping[str, Path], config: Mapping[str, Any]) -> list[Layer]:
    """The weights that stored tensors make up, in order of name; ``config``: the artifact's ``config.json``, or empty.

    Raises:
        InputError: tensors of a packed layer do not fit together.
    """
    quantization = config.get("quantization_config") or {}
    groups: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors:
        groups.setdefault(_base(tensor.name), {})[tensor.name] = tensor
    found = []
    for base, group in sorted(groups.items()):
        parts = {name.removeprefix(f"{base}."): tensor for name, tensor in group.items()}
        try:
            found += _packed(base, parts, quantization, files) or [_plain(tensor) for tensor in group.values()]
        except (KeyError, ZeroDivisionError, IndexError, ValueError, struct.error, OSError) as error:
            raise InputError(
                f"{base}: its tensors do not fit together ({one_line(error)}); fetch the artifact again"
            ) from error
    return found


def _base(name: str) -> str:
    for suffix in _PARTS:
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}")
    return name.removesuffix(".weight")


def _plain(tensor: StoredTensor) -> Layer:
    weights = math.prod(tensor.shape)
    bits = _BITS.get(tensor.kind, 8 * tensor.nbytes / weights if weights else 0)
    return Layer(tensor.name, tensor.kind, bits, weights, tensor.nbytes)


def _packed(
    base: str, parts: Mapping[str, StoredTensor], quantization: Mapping[str, Any], files: Mapping[str, Path]
) -> list[Layer]:
    """The layer whose codes are packed; nothing where these are no such layer's tensors."""
    nbytes = sum(tensor.nbytes for tensor in parts.values())
    method = str(quantization.get("quant_method", ""))
    if "qweight" in parts:
        rows, columns = parts["qweight"].shape
        if method == "awq" or ("g_idx" not in parts and rows > columns * 8):
            weights = rows * parts["scales"].shape[1]
            return [Layer(f"{base}.weight", *_code(32 * columns / parts["scales"].shape[1], "awq"), weights, nbytes)]
        weights = columns * (parts["g_idx"].shape[0] if "g_idx" in parts else rows * 32 // int(quantization["bits"]))
        return [Layer(f"{base}.weight", *_code(32 * rows * columns / weights, "gptq"), weights, nbytes)]
    if "weight_packed" in parts:
        weights = math.prod(_shape(parts["weight_shape"], files))
        packed = parts["weight_packed"]
        # Rows are padded to whole words, which is less than a code's width over a row of many words.
        bits = math.floor(8 * packed.nbytes / weights + 1e-9) or 1
        return [Layer(f"{base}.weight", *_code(bits, "compressed-tensors"), weights, nbytes)]
    weight = parts.get("weight")
    if weight is None:
        return []
    weights = math.prod(weight.shape)
    state = next((name.rpartition("__")[2] for name in parts if name.startswith("weight.quant_state.")), None)
    if state is not None:
        return [Layer(f"{base}.weight", f"{state.upper()} (bitsandbytes)", 4, 2 * weights, nbytes)]
    if weight.kind == "I8" and ("SCB" in parts or "weight_scale" in parts):
        kind = "bitsandbytes" if "SCB" in parts else "compressed-tensors"
        return [Layer(f"{base}.weight", *_code(8, kind), weights, nbytes)]
    return []


def _code(bits: float, container: str) -> tuple[str, float]:
    if bits != int(bits) or not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits:g} bits")
    return f"I{int(bits)} ({container})", int(bits)


def _shape(tensor: StoredTensor, files: Mapping[str, Path]) -> tuple[int, ...]:
    if tensor.nbytes > 64 or tensor.kind not in ("I64", "I32"):
        raise ValueError(f"{tensor.name} holds no shape")
    with files[tensor.file].open("rb") as stream:
        stream.seek(tensor.offset)
        data = stream.read(tensor.nbytes)
    return struct.unpack(f"<{math.prod(tensor.shape)}{'q' if tensor.kind == 'I64' else 'i'}", data)
