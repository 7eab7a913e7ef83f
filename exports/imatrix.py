"""Importance matrices as llama.cpp keeps them: for each matrix of a model, how large the squares of its inputs were, by column.

The format is that of ``tools/imatrix`` and ``common/imatrix-loader`` in llama.cpp: a GGUF file with ``general.type`` "imatrix"
and two float32 tensors a matrix, ``NAME.in_sum2`` and ``NAME.counts``. Older files (``.dat``) hold means times a number of
calls instead; they are read as well, and never written. ``llama-quantize`` weighs the error in a column by ``sum / count``.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from quantize.errors import InputError, one_line
from quantize.files import atomic_path

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


@dataclass(frozen=True)
class ImatrixEntry:
    """What was seen of one matrix's inputs.

    Attributes:
        sums: sums of squares of the inputs, float32 ``[columns]``; for a tensor of experts ``[experts, columns]``.
        counts: inputs that were summed, int64 ``[1]``, or ``[experts]``. In a file of the older format, calls of the model,
            with ``sums`` the means times those.
    """

    sums: NDArray[np.float32]
    counts: NDArray[np.int64]

    def means(self) -> NDArray[np.float32]:
        """Mean squares, float32 shaped as ``sums``; 1 for an expert that no input reached, as ``llama-quantize`` takes it."""
        counts = self.counts.astype(np.float32)
        if self.sums.ndim > 1:
            counts = counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)


def write(path: Path, entries: Mapping[str, ImatrixEntry], datasets: Sequence[str], chunk_count: int, chunk_size: int) -> None:
    """Write an importance matrix, atomically; matrices in order of their names, so equal entries give equal bytes.

    Args:
        path: the file, by custom ``.gguf``.
        entries: by the matrix's name in the GGUF model, such as ``blk.0.attn_q.weight``.
        datasets: names of the texts it was collected on.
        chunk_count: windows of text.
        chunk_size: tokens in a window.

    Raises:
        InputError: there are no entries or no dataset, or an entry's counts do not fit its sums or are not finite.
    """
    if not entries or not datasets:
        raise InputError(f"{path}: an importance matrix needs at least one matrix and the name of a text")
    # A model's file has an architecture; this is none, and llama.cpp's own has no such key.
    writer = gguf.GGUFWriter(None, "")
    writer.add_type("imatrix")
    writer.add_array(_DATASETS, list(datasets))
    writer.add_uint32(_CHUNK_COUNT, chunk_count)
    writer.add_uint32(_CHUNK_SIZE, chunk_size)
    for name in sorted(entries):
        entry = entries[name]
        sums = np.atleast_2d(entry.sums).astype(np.float32)
        if entry.counts.shape != sums.shape[:1] or not np.isfinite(sums).all():
            raise InputError(
                f"{path}: {name} has sums {entry.sums.shape} and counts {entry.counts.shape}; "
                "they must be finite, with a count for each matrix"
            )
        writer.add_tensor(name + _SUMS, sums)
        writer.add_tensor(name + _COUNTS, entry.counts.astype(np.float32)[:, None])
    with atomic_path(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read(path: Path) -> dict[str, ImatrixEntry]:
    """Read an importance matrix of either format; entries by the matrix's name in the GGUF model.

    Raises:
        InputError: the file is missing, damaged, or holds something else.
    """
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
            entries = _read_legacy(path, stream.read(), magic) if magic != b"GGUF" else _read_gguf(path)
    except OSError as error:
        raise InputError(f"imatrix {path} cannot be read ({error.strerror}); give a file of llama-imatrix") from error
    for name, entry in entries.items():
        if not np.isfinite(entry.sums).all() or bool((entry.sums < 0).any()):
            raise InputError(f"imatrix {path}: {name} holds sums of squares that are negative or not finite; make it again")
    return entries


def _read_gguf(path: Path) -> dict[str, ImatrixEntry]:
    try:
        reader = gguf.GGUFReader(path)
        kind = reader.fields["general.type"].contents() if "general.type" in reader.fields else None
        # Copies: the reader maps the file.
        tensors = {tensor.name: np.array(tensor.data, ndmin=2) for tensor in reader.tensors}
    except Exception as error:  # gguf-py reports damage by whatever its numpy arithmetic raises
        raise InputError(f"imatrix {path} is damaged ({one_line(error)}); make it again") from error
    if kind != "imatrix":
        raise InputError(f"{path} is a GGUF file of type {kind or 'model'}, no importance matrix; give one of llama-imatrix")
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    found = {}
    for name in names:
        sums, counts = tensors[name + _SUMS], tensors.get(name + _COUNTS)
        if counts is None or sums.dtype != np.float32 or counts.dtype != np.float32 or len(counts) != len(sums):
            raise InputError(f"imatrix {path}: {name} lacks counts that fit its sums, both float32; make it again")
        found[name] = ImatrixEntry(sums[0] if len(sums) == 1 else sums, np.rint(counts[:, 0]).astype(np.int64))
    if not found:
        raise InputError(f"imatrix {path} holds no matrix; make it again")
    return found


def _read_legacy(path: Path, rest: bytes, magic: bytes) -> dict[str, ImatrixEntry]:
    """The format without a magic number: entries of ``length name calls size values``, integers int32, little-endian."""
    stream = io.BytesIO(magic + rest)

    def integer(largest: int) -> int:
        data = stream.read(4)
        value = struct.unpack("<i", data)[0] if len(data) == 4 else -1
        if not 0 < value <= largest:
            raise InputError(f"{path} is neither an importance matrix in GGUF nor one of the older format; make it again")
        return int(value)

    found, size = {}, len(rest) + len(magic)
    for _ in range(integer(size)):
        name = stream.read(integer(size)).decode("utf-8", errors="replace")
        calls, columns = integer(2**31), integer(size // 4)
        data = stream.read(4 * columns)
        if len(data) != 4 * columns:
            raise InputError(f"imatrix {path} ends in the middle of {name}; make it again")
        found[name] = ImatrixEntry(np.frombuffer(data, "<f4").astype(np.float32), np.array([calls], np.int64))
    return found
