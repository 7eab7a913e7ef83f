"""Bytes of llama.cpp's tensor types: where a block keeps its codes, scales and minima.

The formats are the C structs of llama.cpp's ``ggml/src/ggml-common.h`` (``block_q4_0`` .. ``block_q6_K``), little-endian. A
row of weights is a row of blocks. Blocks of 32 weights ("legacy" types) have one float16 scale and, in the ``_1`` types, one
float16 minimum. Blocks of 256 ("k-quants") have float16 *supers*, by which the small integer *factors* of each group of 32
or 16 weights are multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Bytes = npt.NDArray[np.uint8]
Factors = npt.NDArray[np.int16]

_NIBBLE, _FOUR, _SIGN = np.uint8(15), np.uint8(4), np.uint8(128)
# Q6_K's upper two bits: one byte for the same place in four runs of 32 weights.
_QUARTERS = np.array([0, 2, 4, 6], np.uint8)[:, None, None]


@dataclass(frozen=True)
class GgufType:
    """One tensor type of llama.cpp.

    Attributes:
        name: llama.cpp's name, such as ``Q4_K``.
        ggml_type: its number in a GGUF file.
        block_size: weights in a block.
        type_size: bytes in a block.
        bits: bits of a code; 0 for types that store the values themselves.
        group_size: weights that share a scale; 0 for types that store the values themselves.
        supers: float16 numbers in a block (scale, or scale and minimum).
        offset: the code that stands for zero in types without minima (``value = scale * (code - offset)``), else 0.
    """

    name: str
    ggml_type: int
    block_size: int
    type_size: int
    bits: int = 0
    group_size: int = 0
    supers: int = 0
    offset: int = 0

    @property
    def dense(self) -> bool:
        """Whether a weight is stored as a number, not as a code."""
        return self.bits == 0

    @property
    def super_blocks(self) -> bool:
        """Whether this is a k-quant: groups' scales are integers times a float16."""
        return self.block_size == 256

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` weights.

        Raises:
            ValueError: ``columns`` is not a multiple of the block size.
        """
        if columns % self.block_size:
            raise ValueError(f"{columns} columns are no multiple of {self.name}'s block of {self.block_size} weights")
        return columns // self.block_size * self.type_size

    def columns(self, row_bytes: int) -> int:
        """Weights in a row of ``row_bytes`` bytes.

        Raises:
            ValueError: ``row_bytes`` is not a multiple of the block's bytes.
        """
        if row_bytes % self.type_size:
            raise ValueError(f"{row_bytes} bytes are no multiple of {self.name}'s block of {self.type_size} bytes")
        return row_bytes // self.type_size * self.block_size


TYPES: dict[str, GgufType] = {
    kind.name: kind
    for kind in (
        GgufType("F32", 0, 1, 4),
        GgufType("F16", 1, 1, 2),
        GgufType("BF16", 30, 1, 2),
        GgufType("Q4_0", 2, 32, 18, bits=4, group_size=32, supers=1, offset=8),
        GgufType("Q4_1", 3, 32, 20, bits=4, group_size=32, supers=2),
        GgufType("Q5_0", 6, 32, 22, bits=5, group_size=32, supers=1, offset=16),
        GgufType("Q5_1", 7, 32, 24, bits=5, group_size=32, supers=2),
        GgufType("Q8_0", 8, 32, 34, bits=8, group_size=32, supers=1, offset=128),
        GgufType("Q4_K", 12, 256, 144, bits=4, group_size=32, supers=2),
        GgufType("Q5_K", 13, 256, 176, bits=5, group_size=32, supers=2),
        GgufType("Q6_K", 14, 256, 210, bits=6, group_size=16, supers=1, offset=32),
    )
}


class Fields(NamedTuple):
    """What ``n`` blocks hold, a block in each column: so that numpy's loops run along blocks, not along 32 weights.

    codes: uint8 ``[block_size, n]``, unsigned (Q8_0's int8 plus 128). halves: float16 ``[supers, n]``. factors: int16
    ``[supers, groups, n]``, the k-quants' 6-bit scales (and minima) or Q6_K's int8 scales; None for blocks of 32.
    """

    codes: Bytes
    halves: Halves
    factors: Factors | None


class _Layout(NamedTuple):
    """Byte ranges in a block. ``run`` weights share their bytes' low nibbles, the ``run`` weights after them the high ones."""

    halves: slice
    low: slice
    run: int
    high: slice | None = None
    factors: slice | None = None


_LAYOUTS = {
    "Q4_0": _Layout(slice(0, 2), slice(2, 18), 16),
    "Q4_1": _Layout(slice(0, 4), slice(4, 20), 16),
    "Q5_0": _Layout(slice(0, 2), slice(6, 22), 16, slice(2, 6)),
    "Q5_1": _Layout(slice(0, 4), slice(8, 24), 16, slice(4, 8)),
    "Q8_0": _Layout(slice(0, 2), slice(2, 34), 0),
    "Q4_K": _Layout(slice(0, 4), slice(16, 144), 32, None, slice(4, 16)),
    "Q5_K": _Layout(slice(0, 4), slice(48, 176), 32, slice(16, 48), slice(4, 16)),
    "Q6_K": _Layout(slice(208, 210), slice(0, 128), 64, slice(128, 192), slice(192, 208)),
}


def join(fields: Fields, kind: GgufType, out: Bytes) -> None:
    """Write blocks.

    Args:
        fields: ``n`` blocks; codes below ``2**bits``, factors in the range of their bits.
        kind: a type with codes.
        out: uint8 ``[n, type_size]``.
    """
    layout, codes = _LAYOUTS[kind.name], fields.codes
    # "<f2" keeps the file little-endian whatever the machine is.
    out[:, layout.halves] = np.ascontiguousarray(fields.halves.T, "<f2").view(np.uint8)
    low = _join_nibbles(codes, layout.run) if layout.run else codes ^ _SIGN
    out[:, layout.low] = low.T
    if layout.high is not None:
        out[:, layout.high] = _join_high(codes >> _FOUR, kind).T
    if layout.factors is not None and fields.factors is not None:
        packed = fields.factors[0].astype(np.int8).view(np.uint8) if kind.supers == 1 else _join_factors(fields.factors)
        out[:, layout.factors] = packed.T


def split(blocks: Bytes, kind: GgufType) -> Fields:
    """Inverse of :func:`join`: uint8 ``[n, type_size]`` to :class:`Fields`."""
    layout = _LAYOUTS[kind.name]
    halves = np.ascontiguousarray(blocks[:, layout.halves]).view("<f2").T.astype(np.float16, copy=False)
    low = np.ascontiguousarray(blocks[:, layout.low].T)
    codes = _split_nibbles(low, layout.run) if layout.run else low ^ _SIGN
    if layout.high is not None:
        codes |= _split_high(np.ascontiguousarray(blocks[:, layout.high].T), kind) << _FOUR
    factors: Factors | None = None
    if layout.factors is not None:
        packed = np.ascontiguousarray(blocks[:, layout.factors].T)
        factors = packed.view(np.int8).astype(np.int16)[None] if kind.supers == 1 else _split_factors(packed)
    return Fields(codes, halves, factors)


def _join_nibbles(codes: Bytes, run: int) -> Bytes:
    runs = codes.reshape(-1, 2, run, codes.shape[1])
    low = runs[:, 0] & _NIBBLE
    low |= runs[:, 1] << _FOUR
    return low.reshape(-1, codes.shape[1])


def _split_nibbles(low: Bytes, run: int) -> Bytes:
    runs = low.reshape(-1, run, low.shape[1])
    return np.stack((runs & _NIBBLE, runs >> _FOUR), axis=1).reshape(-1, low.shape[1])


def _join_high(high: Bytes, kind: GgufType) -> Bytes:
    """The bits above the nibble: bit ``i`` for weight ``i`` (Q5_0, Q5_1), or one byte for each place in all groups."""
    n = high.shape[1]
    if kind.name == "Q5_K":
        return np.packbits(high.reshape(8, 32, n), axis=0, bitorder="little").reshape(32, n)
    if kind.name == "Q6_K":
        joined: Bytes = np.bitwise_or.reduce(high.reshape(2, 4, 32, n) << _QUARTERS, axis=1)
        return joined.reshape(64, n)
    return np.packbits(high, axis=0, bitorder="little")


def _split_high(high: Bytes, kind: GgufType) -> Bytes:
    n = high.shape[1]
    if kind.name == "Q5_K":
        return np.unpackbits(high[None], axis=0, bitorder="little").reshape(256, n)
    if kind.name == "Q6_K":
        quarters = high.reshape(2, 1, 32, n) >> _QUARTERS
        return (quarters & np.uint8(3)).reshape(256, n)
    return np.unpackbits(high, axis=0, bitorder="little")


def _join_factors(factors: Factors) -> Bytes:
    """Eight 6-bit scales and eight 6-bit minima in 12 bytes; those of groups 4..7 are cut into 4 bits and 2 bits."""
    scales, minima = factors.astype(np.uint8)
    top, two = np.uint8(48), np.uint8(2)
    parts = (
        scales[:4] | (scales[4:] & top) << two,
        minima[:4] | (minima[4:] & top) << two,
        scales[4:] & _NIBBLE | minima[4:] << _FOUR,
    )
    return np.concatenate(parts)


def _split_factors(packed: Bytes) -> Factors:
    first, second, rest = packed[:4], packed[4:8], packed[8:]
    six, below = np.uint8(6), np.uint8(63)
    scales = np.concatenate((first & below, rest & _NIBBLE | (first >> six) << _FOUR))
    minima = np.concatenate((second & below, rest >> _FOUR | (second >> six) << _FOUR))
    return np.stack((scales, minima)).astype(np.int16)
