"""Bit packing of GPTQ checkpoints: codes as a little-endian bit stream in int32 words.

``qweight`` packs along the input dimension: value ``i`` of a column takes bits ``i*bits .. (i+1)*bits-1`` of the column's
stream, whose word ``k`` holds bits ``32k .. 32k+31``. For 2, 4 and 8 bits no value crosses a word; for 3 bits, 32 values
fill three words and values 10 and 21 straddle them: the layout of AutoGPTQ's ``QuantLinear.pack``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def values_per_period(bits: int) -> int:
    """The number of values after which the stream is back at a word boundary: 16, 32, 8, 4 for 2, 3, 4, 8 bits."""
    return 32 // math.gcd(32, bits)


def to_signed(codes: Tensor) -> Tensor:
    """8-bit codes around their symmetric zero point: uint8 0..255 to int8 -128..127."""
    return (codes.to(torch.int16) - 128).to(torch.int8)


def to_unsigned(values: Tensor) -> Tensor:
    """Inverse of :func:`to_signed`."""
    return (values.to(torch.int16) + 128).to(torch.uint8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack along dimension 0.

    Args:
        codes: integer ``[n, columns]``, each in ``[0, 2**bits)``; ``n`` is a multiple of :func:`values_per_period`.
        bits: width of a code.

    Returns:
        int32 ``[n * bits // 32, columns]``.
    """
    period = values_per_period(bits)
    rows, columns = codes.shape
    if rows % period:
        raise ValueError(f"{rows} rows of {bits}-bit codes do not fill whole 32-bit words; need a multiple of {period}")
    words_per_period = period * bits // 32
    blocks = codes.view(rows // period, period, columns)
    words = torch.zeros(rows // period, words_per_period, columns, dtype=torch.int64)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        value = blocks[:, i].long()
        words[:, word] |= value << shift
        if shift + bits > 32:
            words[:, word + 1] |= value >> (32 - shift)
    return _to_int32(words).view(-1, columns)


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`pack_rows`: int32 ``[words, columns]`` to uint8 ``[words * 32 // bits, columns]``."""
    period = values_per_period(bits)
    words_per_period = period * bits // 32
    words = (packed.long() & 0xFFFFFFFF).view(-1, words_per_period, packed.shape[1])
    codes = torch.empty(words.shape[0], period, packed.shape[1], dtype=torch.uint8)
    for i in range(period):
        word, shift = divmod(i * bits, 32)
        value = words[:, word] >> shift
        if shift + bits > 32:
            value = value | (words[:, word + 1] << (32 - shift))
        codes[:, i] = (value & (2**bits - 1)).to(torch.uint8)
    return codes.view(-1, packed.shape[1])


def _to_int32(words: Tensor) -> Tensor:
    words = words & 0xFFFFFFFF
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
