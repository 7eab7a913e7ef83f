"""The GGUF container: one file with weights, metadata and tokenizer that llama.cpp and what is built on it run.

What a solver has quantized is packed as it is; every other tensor is rounded to nearest in the type that llama.cpp would give
it in a file of this kind (:mod:`exports.gguf_mix`), by arithmetic that gives llama.cpp's own bytes (:mod:`exports.gguf_types`).
A directory holds ``model.gguf`` and nothing else, for the file is complete.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exports.base import Artifact, Container
from exports.gguf_file import GgufTensor, write_gguf
from exports.gguf_mix import FILE_TYPES, in_order, tensor_types
from exports.gguf_names import TensorMap
from exports.gguf_types import TYPES, pack, quantize
from quantize.errors import InputError
from quantize.grids import Grid, QuantizedTensor

FILE = "model.gguf"
DENSE_TYPES = ("F32", "F16", "BF16")
_ROWS = 2**22  # numbers that are rounded at once


@dataclass(frozen=True)
class Stored:
    """Where a tensor of the checkpoint goes.

    Attributes:
        name: in the file.
        kind: llama.cpp's name of its type.
        shape: in the file, ``[rows, columns]`` order.
    """

    name: str
    kind: str
    shape: tuple[int, ...]


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], file_type: str, **options: Any) -> dict[str, Stored]:
    """The name and type in the file of each tensor that is stored, in the file's order, by its name in the checkpoint.

    Args:
        config: the model's Hugging Face config.
        shapes: of all tensors of the checkpoint.
        file_type: one of :data:`exports.gguf_mix.FILE_TYPES`.
        options: ``pure``, ``embedding``, ``output`` and ``imatrix`` of :func:`exports.gguf_mix.tensor_types`.

    Raises:
        InputError: llama.cpp has no such architecture, or a tensor has no place in it.
    """
    names = TensorMap(config)
    placed = {}
    for name, shape in shapes.items():
        if stored := names.name(name):
            placed[name] = (stored, names.shape(name, shape))
    sources = {stored: name for name, (stored, _) in placed.items()}
    order = [sources[stored] for stored in in_order(list(sources))]
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    kinds = tensor_types(
        [placed[name] for name in order],
        file_type,
        layers=int(config.get("num_hidden_layers") or config.get("n_layer") or 1),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        architecture=names.architecture,
        **options,
    )
    return {name: Stored(placed[name][0], kinds[placed[name][0]], placed[name][1]) for name in order}


def main_type(file_type: str) -> str:
    """The type of most matrices in a file of this type: ``Q4_K`` of ``Q4_K_M``."""
    return file_type.removesuffix("_S").removesuffix("_M")


def check(name: str, out_features: int, in_features: int, grid: Grid) -> None:
    """Raise :class:`InputError` where a layer of this shape cannot be stored on ``grid``."""
    grid.check_divides(name, in_features)


def write(directory: Path, artifact: Artifact) -> None:
    """Write ``model.gguf`` into an existing directory.

    Raises:
        InputError: the tokenizer or the architecture has no form in GGUF.
    """
    file_type = str(artifact.options["file_type"])
    names = TensorMap(artifact.config)
    tensors = [
        GgufTensor(stored.name, stored.kind, stored.shape, _data_of(name, stored, artifact, names))
        for name, stored in artifact.stored.items()
    ]
    if artifact.tokenizer is None:
        raise ValueError("a GGUF file holds its tokenizer; the artifact has none")
    write_gguf(
        directory / FILE,
        config=artifact.config,
        tokenizer_dir=artifact.tokenizer,
        tensors=tensors,
        file_type=FILE_TYPES[file_type],
        extra={"general.quantized_by": str(artifact.options["quantizer"])} if artifact.layers else {},
    )


def _data_of(name: str, stored: Stored, artifact: Artifact, names: TensorMap) -> Callable[[], NDArray[Any]]:
    layer = name.removesuffix(".weight")

    def packed() -> NDArray[Any]:
        tensor = artifact.layer(layer)
        return pack_layer(tensor, stored.kind, names.row_order(name, len(tensor.codes)))

    def rounded() -> NDArray[Any]:
        values = names.transform(name, _numpy(artifact.tensor(name)))
        return encode(np.ascontiguousarray(values), stored.kind)

    return packed if layer in artifact.layers else rounded


def _numpy(tensor: Tensor) -> NDArray[Any]:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def encode(values: NDArray[Any], kind: str) -> NDArray[Any]:
    """A dense tensor in one of llama.cpp's types: uint8 ``[..., bytes of a row]``, numbers themselves for F32 and F16.

    A slice at a time is widened to float32.

    Raises:
        InputError: a value has no form in that type.
    """
    if kind in ("F32", "F16"):
        return _cast(values, kind)
    flat = values.reshape(-1, values.shape[-1])
    rows = max(1, _ROWS // max(1, values.shape[-1]))
    parts = [quantize(flat[start : start + rows].astype(np.float32), kind) for start in range(0, len(flat), rows)]
    return np.concatenate(parts).reshape(*values.shape[:-1], -1)


def _cast(values: NDArray[Any], kind: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        found = values.astype(np.float32 if kind == "F32" else np.float16)
    if not np.isfinite(found).all():
        raise InputError(f"a tensor has values up to {float(np.abs(values).max()):.3g}, beyond F16; use grid=bf16 or f32")
    return found


def pack_layer(tensor: QuantizedTensor, kind: str, order: NDArray[Any] | None = None) -> NDArray[np.uint8]:
    """The bytes of a quantized layer, ``[rows, bytes of a row]``; ``order`` says which row comes first, second, ..."""
    codes, scales, zeros = tensor.codes.numpy(), tensor.scales.float().numpy(), tensor.zeros.float().numpy()
    if order is not None:
        codes, scales, zeros = codes[order], scales[order], zeros[order]
    supers = None
    if TYPES[kind].block_size > 32:
        together = TYPES[kind].block_size // TYPES[kind].group_size
        limit = 127 if kind == "Q6_K" else 63
        steps = [common_step(scales, together, limit)]
        if kind != "Q6_K":
            steps.append(common_step(scales * zeros, together, limit))
        supers = np.stack(steps, -1)
    minima = -scales * zeros
    if supers is None and TYPES[kind].supers == 2:
        minima = minima.astype(np.float16).astype(np.float32)  # it was one: undoes the division by the scale
    return pack(codes, scales, minima, supers, kind)


def common_step(values: NDArray[Any], together: int, limit: int) -> NDArray[np.float16]:
    """The FP16 number of which each super-block's values are multiples by at most ``limit``: float16 ``[rows, super-blocks]``.

    Solvers hand on scales, not codes of scales. Of all FP16 numbers that the largest value may be a multiple of, the first is
    taken that divides the others as well; values are float32, which holds such products to the bit or nearly.

    Raises:
        ValueError: there is none.
    """
    blocks = np.abs(values).reshape(len(values), -1, together)
    largest = blocks.max(-1)
    found = np.zeros(largest.shape, np.float16)
    open_ = largest > 0
    for multiple in range(limit, 0, -1):
        if not open_.any():
            break
        step = (largest[open_] / multiple).astype(np.float16)
        wide = np.maximum(step.astype(np.float32), np.float32(2**-24))
        codes = np.rint(blocks[open_] / wide[:, None])
        fits = (np.abs(codes * wide[:, None] - blocks[open_]) <= 2e-6 * largest[open_][:, None]).all(-1) & (step > 0)
        where = tuple(axis[fits] for axis in np.nonzero(open_))
        found[where] = step[fits]
        open_[where] = False
    if open_.any():
        raise ValueError("scales that are no multiples of a common FP16 step")
    return found


def read(directory: Path) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    """Every tensor of the file, dequantized, by the name that transformers gives it; there are no codes to be had.

    Raises:
        InputError: the file is damaged, or of an architecture that transformers does not read.
    """
    from quantize.checkpoint import open_checkpoint

    file = directory / FILE
    if not file.exists():
        raise InputError(f"{directory} has no {FILE}; it is no GGUF artifact")
    checkpoint = open_checkpoint(str(file))
    return {}, {name: checkpoint.tensor(name) for name in checkpoint.names()}


CONTAINER = Container(
    quantized=True,
    check=check,
    write=write,
    read=read,
    dense=True,
    rounds=True,
    file_types=tuple(name.lower() for name in FILE_TYPES),
    complete=True,
    mixed_grids=True,
    head=False,
)
