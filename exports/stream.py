"""Writing a safetensors file tensor by tensor: memory holds one tensor, not the file.

The format (https://huggingface.co/docs/safetensors, "Format") is an 8-byte little-endian header length, a JSON header padded
with spaces to a multiple of 8, and the tensors' bytes without gaps. The ``safetensors`` package writes only what is whole in
memory. Here bytes go to a spool file as they come and are then put in the package's own order (widest type first, then by
name, which keeps every tensor aligned), so that both write the same file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

# In the package's order of types, narrowest first.
_TYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_RANK = {name: rank for rank, name in enumerate(_TYPES.values())}
_CHUNK = 2**20


class SafetensorsWriter:
    """A safetensors file in the making; a context manager, whose regular end puts the file together."""

    def __init__(self, path: Path, metadata: dict[str, str]) -> None:
        self.path, self._metadata = path, metadata
        self._spool = path.with_name(path.name + ".spool")
        self._entries: dict[str, tuple[str, list[int], int, int]] = {}  # type, shape, start in the spool, bytes
        self._file: BinaryIO = self._spool.open("wb")
        self.nbytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor.

        Raises:
            ValueError: a second tensor of one name, or a type safetensors does not have.
        """
        if name in self._entries:
            raise ValueError(f"two tensors are named {name}")
        if tensor.dtype not in _TYPES:
            raise ValueError(f"safetensors cannot hold {tensor.dtype} ({name})")
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.write(raw.data)
        self._entries[name] = (_TYPES[tensor.dtype], list(tensor.shape), self.nbytes, raw.nbytes)
        self.nbytes += raw.nbytes

    @property
    def names(self) -> list[str]:
        """Names of the tensors added, in order."""
        return list(self._entries)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._file.close()
            if kind is None:
                self._assemble()
        finally:
            self._spool.unlink(missing_ok=True)

    def _assemble(self) -> None:
        order = sorted(self._entries, key=lambda name: (-_RANK[self._entries[name][0]], name.encode()))
        header: dict[str, object] = {"__metadata__": self._metadata}
        position = 0
        for name in order:
            kind, shape, _, size = self._entries[name]
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with self._spool.open("rb") as spool, self.path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                _, _, start, size = self._entries[name]
                spool.seek(start)
                while size:
                    chunk = spool.read(min(size, _CHUNK))
                    file.write(chunk)
                    size -= len(chunk)
            file.flush()
            os.fsync(file.fileno())
