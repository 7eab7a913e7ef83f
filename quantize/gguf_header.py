"""The bytes of a GGUF file's header, read in order, and the types in it (ggml's ``docs/gguf.md``, ``ggml/include/ggml.h``)."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from quantize.errors import InputError, one_line

# Tensor types in files: name, weights in a block, bytes in a block. Numbers left out were types once and are refused.
TENSOR_KINDS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
# Value types of the metadata that have a fixed size.
NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")

# They bound the time and memory of opening a hostile file of any size, here and in gguf-py, which takes a kilobyte for every
# element; the largest vocabularies have a quarter of a million tokens with scores and types, and twice as many merges.
MAX_HEADER = 64 << 20
MAX_ELEMENTS = 1 << 21
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_DEPTH = 4


def shown(text: str, longest: int = 80) -> str:
    """A file's text as it may stand in a message: its first ``longest`` characters, those that act on a terminal escaped."""
    cut = text if len(text) <= longest else text[: longest - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


class Header:
    """The header's bytes, read in order from ``position`` on and never beyond their end.

    Every method raises :class:`InputError` where the bytes left do not hold what they claim; ``what`` names it.

    Attributes:
        position: bytes from the beginning of the file to what is read next.
        elements: elements of all arrays met so far.
    """

    def __init__(self, file: Path, data: mmap.mmap, position: int = 0) -> None:
        self.file = file
        self.data = data
        self.position = position
        self.end = min(len(data), MAX_HEADER)
        self.elements = 0

    def fail(self, problem: str) -> NoReturn:
        """Raise: the file is damaged, and how."""
        raise InputError(f"{self.file} is not a readable GGUF model ({problem}); fetch it again")

    def take(self, count: int, what: str) -> int:
        """Where the next ``count`` bytes begin; the position moves behind them."""
        start = self.position
        if count > self.end - start:
            if self.end < len(self.data):
                self.fail(f"{what} reaches beyond {self.end >> 20} MiB, the longest header read")
            self.fail(f"{what} takes {count} bytes from byte {start} on, but the file ends at byte {self.end}")
        self.position = start + count
        return start

    def number(self, layout: struct.Struct, what: str) -> int:
        """An unsigned number, as in ``U32`` and ``U64``."""
        number: int = layout.unpack_from(self.data, self.take(layout.size, what))[0]
        return number

    def text(self, what: str, longest: int = MAX_HEADER) -> str:
        """A string of at most ``longest`` bytes; one that is no UTF-8 is refused."""
        length = self.number(U64, f"the length of {what}")
        if length > longest:
            self.fail(f"{what} is {length} bytes long; at most {longest} are allowed")
        start = self.take(length, what)
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {one_line(error)}")

    def array(self, what: str, depth: int) -> tuple[int, int]:
        """An array's type of elements and their number."""
        if depth == MAX_DEPTH:
            self.fail(f"{what} is an array nested deeper than {MAX_DEPTH}")
        kind, count = self.number(U32, what), self.number(U64, what)
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            self.fail(f"with {count} elements in {what} its arrays hold more than {MAX_ELEMENTS}, the most that are read")
        return kind, count

    def step_over(self, kind: int, what: str, depth: int = 0) -> None:
        """Pass a value of type ``kind`` without decoding it; strings are not looked into."""
        if kind in NUMBERS:
            self.take(NUMBERS[kind].itemsize, what)
        elif kind == STRING:
            self.take(self.number(U64, what), what)
        elif kind == ARRAY:
            inner, count = self.array(what, depth)
            if inner in NUMBERS:
                self.take(count * NUMBERS[inner].itemsize, what)
            elif inner == STRING:
                self._step_over_strings(count, what)
            elif inner == ARRAY:
                for _ in range(count):
                    self.step_over(inner, what, depth + 1)
            else:
                self.fail(f"{what} is an array of the unknown type {inner}")
        else:
            self.fail(f"{what} is of the unknown type {kind}")

    def _step_over_strings(self, count: int, what: str) -> None:
        # Half a million strings are usual: the loop leaves the check of each length to the next read.
        unpack, data, position = U64.unpack_from, self.data, self.position
        try:
            for _ in range(count):
                position += 8 + unpack(data, position)[0]
        except (struct.error, OverflowError):
            position = max(position, self.end) + 1
        self.take(position - self.position, what)

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        """A value that :meth:`step_over` has passed before, as in :attr:`GgufReader.fields`."""
        if kind == STRING:
            return self.text(what)
        if kind in NUMBERS:
            number = self._numbers(kind, 1, what)
            return number[0].item()
        inner, count = self.array(what, depth)
        if inner in NUMBERS:
            return self._numbers(inner, count, what)
        return [self.value(inner, what, depth + 1) for _ in range(count)]

    def _numbers(self, kind: int, count: int, what: str) -> NDArray[Any]:
        start = self.take(count * NUMBERS[kind].itemsize, what)
        numbers: NDArray[Any] = np.frombuffer(self.data[start : self.position], NUMBERS[kind])
        return np.not_equal(numbers, 0) if kind == BOOL else numbers
