"""GGUF files, memory-mapped and read lazily; nothing a file says of itself is believed before its bytes bear it out.

The format is ggml's ``docs/gguf.md``, versions 2 and 3, little endian. What llama.cpp's own reader (``ggml/src/gguf.cpp``)
refuses is refused here too, and more: its reader trusts the memory it runs in. Opening a file steps over the metadata
without decoding it and makes no object whose size the file names. Only numpy is needed.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantize.errors import InputError, one_line
from quantize.gguf_header import MAX_KEYS, MAX_TENSORS, TENSOR_KINDS, U32, U64, UINT32, Header, shown

# ggml's GGML_MAX_NAME (with its final zero) and GGML_MAX_DIMS; the longest key of the specification.
_MAX_NAME, _MAX_DIMS, _MAX_KEY = 63, 4, 65535
_REQUIRED: Any = object()


@dataclass(frozen=True, slots=True)
class GgufTensorInfo:
    """Where a tensor lies and how to read it.

    Attributes:
        name: its name in the file, at most 63 bytes.
        kind: llama.cpp's name of its type, such as ``"Q4_0"``.
        shape: in numpy's order, columns last; 1 to 4 dimensions, none of them zero. The columns fill whole blocks.
        offset: bytes from the beginning of the file to its first block.
        nbytes: bytes of all its blocks.
        row_bytes: bytes of one row of ``shape[-1]`` weights.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    row_bytes: int


class GgufReader:
    """One GGUF file.

    Attributes:
        path: the file.
        version: 2 or 3.
        alignment: bytes; every tensor begins at a multiple of it in the data section.
        tensors: by name, in the file's order.

    Raises:
        InputError: the file is missing, damaged, big-endian, of version 1, or claims what its bytes do not hold.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map, self._identity = _map_file(self.path)
        header = Header(self.path, self._map)
        self.version, tensor_count, key_count = _read_counts(header)
        self._entries = _read_keys(header, key_count)
        self._decoded: dict[str, Any] = {}
        self.alignment = self._read_alignment(header)
        infos = _read_tensors(header, tensor_count)
        self.tensors = _placed(header, infos, self.alignment)

    @property
    def fields(self) -> Mapping[str, Any]:
        """The metadata by key, in the file's order, decoded when asked for.

        Values are ``int``, ``float``, ``bool`` and ``str``; arrays of numbers are numpy arrays of the stored type (bool for
        booleans), arrays of strings ``list[str]``, arrays of arrays lists of those. Asking for a string that is no UTF-8
        raises :class:`InputError`.
        """
        return _Fields(self)

    def field(self, key: str, default: Any = _REQUIRED) -> Any:
        """One value of the metadata, as in :attr:`fields`.

        Raises:
            InputError: the file has no such key and there is no ``default``; or a string of the value is no UTF-8.
        """
        if key in self._entries:
            return self._decode(key)
        if default is _REQUIRED:
            raise InputError(f"{self.path} has no key {key} in its metadata; convert the model again")
        return default

    def encoded(self, key: str) -> bytes:
        """The value of ``key`` as the file holds it: its type (uint32), then its bytes; what a copy has to write.

        Raises:
            KeyError: the file has no such key.
        """
        start, end = self._entries[key]
        return self._map[start:end]

    @property
    def architecture(self) -> str:
        """``general.architecture``.

        Raises:
            InputError: the file does not say, or not with a string.
        """
        name = self.field("general.architecture")
        if not isinstance(name, str):
            raise InputError(f"{self.path}: general.architecture is {shown(repr(name))}; it must be a string like 'llama'")
        return name

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of one tensor: a read-only view of the map, ``[..., row_bytes]`` for a shape of ``[..., columns]``.

        Raises:
            InputError: the file has no such tensor.
        """
        if name not in self.tensors:
            raise InputError(f"{self.path} has no tensor {name}")
        info = self.tensors[name]
        stored = np.frombuffer(self._map, np.uint8, info.nbytes, info.offset)
        return stored.reshape(*info.shape[:-1], info.row_bytes)

    def release(self) -> None:
        """Map the file anew: the pages touched so far are given back once no view from :meth:`data` is left.

        Raises:
            InputError: the file is no longer the one that was opened.
        """
        fresh, identity = _map_file(self.path)
        if identity != self._identity:
            raise InputError(f"{self.path} was changed while it was being read; leave it alone and start again")
        self._map = fresh

    def _decode(self, key: str) -> Any:
        if key not in self._decoded:
            header = Header(self.path, self._map, self._entries[key][0])
            self._decoded[key] = header.value(header.number(U32, key), shown(key))
        return self._decoded[key]

    def _read_alignment(self, header: Header) -> int:
        key = "general.alignment"
        if key not in self._entries:
            return 32
        if U32.unpack_from(self.encoded(key))[0] != UINT32:
            header.fail(f"{key} is not of type uint32")
        alignment = int(self._decode(key))
        if alignment == 0 or alignment & (alignment - 1):
            header.fail(f"{key} is {alignment}; it must be a power of two like 32")
        return alignment


class _Fields(Mapping[str, Any]):
    """A view, made for each asking: kept in the reader, it would be a cycle that keeps the file mapped."""

    def __init__(self, reader: GgufReader) -> None:
        self._reader = reader

    def __getitem__(self, key: str) -> Any:
        if key not in self._reader._entries:
            raise KeyError(key)
        return self._reader.field(key)

    def __contains__(self, key: object) -> bool:
        return key in self._reader._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader._entries)

    def __len__(self) -> int:
        return len(self._reader._entries)


def _map_file(path: Path) -> tuple[mmap.mmap, tuple[int, ...]]:
    """A read-only map, and what tells whether the file is still the same one later."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no file; give a .gguf file")
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size == 0:
                raise InputError(f"{path} is not a readable GGUF model (it is empty); fetch it again")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}); give a .gguf file") from error
    return mapped, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _read_counts(header: Header) -> tuple[int, int, int]:
    """Version, number of tensors, number of keys."""
    start = header.take(4, "the magic")
    if (magic := header.data[start : start + 4]) != b"GGUF":
        header.fail(f"it begins with {magic!r}, not with b'GGUF'")
    version = header.number(U32, "the version")
    # As in llama.cpp: 3 with its bytes swapped.
    if version and version & 0xFFFF == 0:
        raise InputError(f"{header.file} is big-endian; only little-endian files are read: convert it with gguf-convert-endian")
    if version not in (2, 3):
        raise InputError(
            f"{header.file} is GGUF version {version}; versions 2 and 3 are read: convert the model with a current llama.cpp"
        )
    tensors, keys = header.number(U64, "the number of tensors"), header.number(U64, "the number of keys")
    if tensors > MAX_TENSORS:
        header.fail(f"it claims {tensors} tensors; at most {MAX_TENSORS} are read")
    if keys > MAX_KEYS:
        header.fail(f"it claims {keys} keys; at most {MAX_KEYS} are read")
    return version, tensors, keys


def _read_keys(header: Header, count: int) -> dict[str, tuple[int, int]]:
    """Where each value lies, its type included."""
    entries: dict[str, tuple[int, int]] = {}
    for i in range(count):
        key = header.text(f"key {i}", _MAX_KEY)
        if not key:
            header.fail(f"key {i} is empty")
        if key in entries:
            header.fail(f"key {shown(key)} is there twice")
        start, what = header.position, shown(key)
        header.step_over(header.number(U32, what), what)
        entries[key] = (start, header.position)
    return entries


def _read_tensors(header: Header, count: int) -> list[GgufTensorInfo]:
    """All tensors, their offsets still from the beginning of the data section."""
    infos = {}
    for i in range(count):
        name = header.text(f"the name of tensor {i}", _MAX_NAME)
        what = f"tensor {shown(name)}"
        if name in infos:
            header.fail(f"{what} is there twice")
        dimensions = header.number(U32, what)
        if not 1 <= dimensions <= _MAX_DIMS:
            header.fail(f"{what} has {dimensions} dimensions; 1 to {_MAX_DIMS} are allowed")
        shape = tuple(header.number(U64, what) for _ in range(dimensions))[::-1]
        if 0 in shape:
            header.fail(f"{what} has shape {list(shape)}; no dimension may be zero")
        number = header.number(U32, what)
        if number not in TENSOR_KINDS:
            header.fail(f"{what} is of the unknown type {number}")
        kind, block, size = TENSOR_KINDS[number]
        if shape[-1] % block:
            header.fail(f"{what} has {shape[-1]} columns; {kind} needs a multiple of {block}")
        row = shape[-1] // block * size
        nbytes = row
        for rows in shape[:-1]:
            nbytes *= rows
        infos[name] = GgufTensorInfo(name, kind, shape, header.number(U64, what), nbytes, row)
    return list(infos.values())


def _placed(header: Header, infos: list[GgufTensorInfo], alignment: int) -> dict[str, GgufTensorInfo]:
    """The tensors with offsets from the beginning of the file; llama.cpp demands that they follow each other without gaps."""
    begin = _aligned(header.position, alignment)
    expected, last = 0, "the header"
    placed = {}
    for info in infos:
        what = f"tensor {shown(info.name)}"
        if info.offset != expected:
            why = "overlaps" if info.offset < expected else "leaves a gap behind"
            why = f"is not a multiple of {alignment}" if info.offset % alignment else f"{why} {last}"
            header.fail(f"{what} has offset {info.offset}, which {why}; {expected} was expected")
        if begin + info.offset + info.nbytes > len(header.data):
            header.fail(
                f"{what} of shape {list(info.shape)} takes {info.nbytes} bytes from byte {begin + info.offset} on, "
                f"but the file ends at byte {len(header.data)}"
            )
        placed[info.name] = GgufTensorInfo(info.name, info.kind, info.shape, begin + info.offset, info.nbytes, info.row_bytes)
        expected, last = _aligned(info.offset + info.nbytes, alignment), what
    return placed


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
