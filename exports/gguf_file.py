"""Writing GGUF files: metadata and vocabulary of a checkpoint, and tensors of any type, one in memory at a time.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3): header, keys, names and offsets of all
tensors, then their bytes, each from a multiple of 32 on. Bytes are laid out by ``gguf.GGUFWriter``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from exports.gguf_config import architecture, complete_config, warn_of_differences
from exports.gguf_metadata import Value, add_model_metadata, add_values
from exports.gguf_names import rope_tensors
from exports.gguf_vocab import read_vocabulary
from quantize.errors import InputError
from quantize.files import atomic_path

log = logging.getLogger(__name__)

_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        name: its name in the file, like ``blk.0.attn_q.weight``.
        kind: its type by llama.cpp's name: ``F32``, ``F16``, ``BF16``, ``Q4_0``, ...
        shape: logical, ``(rows, columns)`` or ``(values,)``; the last one runs fastest.
        data: makes the stored values or bytes: float32 for ``F32``, float16 for ``F16``, else uint8 or (``BF16``) uint16;
            one array, or several that follow one another; ``nbytes`` in all, whatever their shapes. Called once, when they
            are written.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: Callable[[], NDArray[Any] | Iterable[NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file.

        Raises:
            InputError: an unknown type, or a row that is no whole number of its blocks.
        """
        kinds = gguf.GGMLQuantizationType
        if self.kind not in kinds.__members__:
            raise InputError(f"tensor {self.name}: type {self.kind!r} is none of GGUF's; one of them is Q4_0")
        block, size = gguf.GGML_QUANT_SIZES[kinds[self.kind]]
        if self.shape[-1] % block:
            raise InputError(
                f"tensor {self.name}: rows of {self.shape[-1]} values cannot be {self.kind}, whose blocks hold {block}; "
                "F16 stores rows of any length"
            )
        return int(prod(self.shape) // block * size)


def write_gguf(
    path: Path,
    *,
    config: Mapping[str, Any],
    tokenizer_dir: Path,
    tensors: Iterable[GgufTensor],
    file_type: int,
    name: str | None = None,
    quantization_version: int = 2,
    extra: Mapping[str, Value] | None = None,
    pre: str | None = None,
) -> None:
    """Write a model as one GGUF file: atomically, and the same bytes for the same input.

    Tensors that follow from the configuration alone (RoPE factors) are put in front unless they are among ``tensors``.

    Args:
        path: the file.
        config: the checkpoint's ``config.json``.
        tokenizer_dir: directory of its tokenizer's files.
        tensors: all tensors, in the order in which they are to be stored.
        file_type: ``general.file_type``: the number of the type that most tensors have (1 is F16; ``gguf.LlamaFileType``).
        name: ``general.name``.
        quantization_version: version of the block formats, 2.
        extra: further keys, or other values for those written here.
        pre: llama.cpp's pre-tokenizer, where it is not to be found out from the tokenizer.

    Raises:
        InputError: a model or tokenizer that llama.cpp does not have, no embedding among the tensors, a type that does not
            fit a tensor, or a disk that is full.
        ValueError: ``data`` made something else than announced.
    """
    complete = complete_config(config)
    warn_of_differences(complete)
    stored = list(tensors)
    names = {tensor.name for tensor in stored}
    if _EMBEDDING not in names:
        raise InputError(f"{path}: no tensor {_EMBEDDING} among those to be written; every model here has one")
    computed = {key: value for key, value in rope_tensors(complete).items() if key not in names}
    stored = [*(GgufTensor(key, "F32", value.shape, _constant(value)) for key, value in computed.items()), *stored]
    rows = next(tensor.shape[0] for tensor in stored if tensor.name == _EMBEDDING)
    vocabulary = read_vocabulary(tokenizer_dir, config, rows, pre)

    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture(config))
        try:
            for tensor in stored:
                kind = gguf.GGMLQuantizationType[tensor.kind] if tensor.nbytes else None
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
            writer.add_type(gguf.GGUFType.MODEL)
            if name:
                writer.add_name(name)
            writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
            add_model_metadata(writer, {**complete, "vocab_size": rows})
            writer.add_file_type(file_type)
            writer.add_quantization_version(quantization_version)
            vocabulary.add_to(writer)
            add_values(writer, extra or {})
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in stored:
                _write(writer, tensor)
        finally:
            writer.close()


def _constant(values: NDArray[np.float32]) -> Callable[[], NDArray[Any]]:
    return lambda: values


def _write(writer: Any, tensor: GgufTensor) -> None:
    """Append a tensor's bytes, aligned; ``writer.write_tensor_data`` would need them all at once."""
    made, file, written = tensor.data(), writer.fout[0], 0
    allowed = {"F32": (np.float32,), "F16": (np.float16,), "BF16": (np.uint16, np.uint8)}.get(tensor.kind, (np.uint8,))
    writer.write_padding(file, file.tell())
    for part in [made] if isinstance(made, np.ndarray) else made:
        if part.dtype.type not in allowed:
            raise ValueError(f"tensor {tensor.name}: {part.dtype} instead of {allowed[0].__name__} for {tensor.kind}")
        np.ascontiguousarray(part).tofile(file)
        written += part.nbytes
    if written != tensor.nbytes:
        raise ValueError(f"tensor {tensor.name}: {written} bytes; announced were {tensor.nbytes} of {tensor.kind}")
    writer.write_padding(file, written)
