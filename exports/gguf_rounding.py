"""Rounding to nearest in blocks of 32: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 as llama.cpp writes them, to the byte.

The arithmetic is that of ``quantize_row_*_ref`` in llama.cpp's ``ggml/src/ggml-quants.c``, which is what ``llama-quantize``
runs without an importance matrix. Everything is float32 in its order of operations; codes come from truncation after adding a
half (Q8_0: ``roundf``), scales are rounded to float16 only when they are stored.
"""

from __future__ import annotations

import numpy as np

from exports.gguf_layout import Bytes, Fields, Floats, GgufType, Halves

# The bits of the largest float32 below 0.5: adding 0.5 itself would carry 0.49999997 up to 1.
_ALMOST_HALF = np.nextafter(np.float32(0.5), np.float32(0)).view(np.int32)
_SIGN = np.int32(-(2**31))


def round_blocks(values: Floats, kind: GgufType) -> Fields:
    """Codes and scales of ``n`` blocks.

    Args:
        values: float32 ``[32, n]``, a block in each column.
        kind: one of the types with blocks of 32.

    Returns:
        Codes and float16 scales (and minima).

    Raises:
        ValueError: a value is infinite or not a number, or a scale does not fit in float16 (``llama-quantize`` refuses both).
    """
    high, low = values.max(axis=0), values.min(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        if kind.supers == 2:
            return _round_affine(values, low, high, kind)
        if kind.name == "Q8_0":
            return _round_q8_0(values, low, high)
        return _round_signed(values, low, high, kind)


def signed_peak(values: Floats, low: Floats, high: Floats) -> Floats:
    """Of each column the value of largest magnitude, with its sign; of equal ones the first. Zero is +0.

    Args:
        values: float32 ``[m, n]``.
        low: minima of the columns.
        high: maxima of the columns.
    """
    peak = np.where(high > -low, high, low)
    ties = np.flatnonzero(high == -low)
    if ties.size:
        tied = values[:, ties]
        peak[ties] = np.take_along_axis(tied, np.abs(tied).argmax(axis=0)[None], axis=0)[0]
    return peak + np.float32(0)


def stored(*numbers: Floats) -> Halves:
    """float32 ``[n]`` each, rounded to float16 ``[len(numbers), n]``.

    Raises:
        ValueError: one is not finite in float16.
    """
    halves = np.stack(numbers).astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError("values are not finite, or too large: a block's scale exceeds 65504, the largest float16")
    return halves


def _inverse(scale: Floats) -> tuple[Floats, Bytes | None]:
    """``1 / scale``, 0 where the scale is 0; and a mask of blocks where it overflows, None where there is no such block.

    In those blocks ggml's conversion of infinity or NaN to an integer gives code 0 for every weight on x86.
    """
    with np.errstate(divide="ignore"):
        inverse = np.float32(1) / scale
    unbounded = np.isinf(inverse)
    if not unbounded.any():
        return inverse, None
    inverse[unbounded] = 0
    overflow = unbounded & (scale != 0)
    return inverse, overflow if overflow.any() else None


def _truncated(scaled: Floats, half: float, top: int, overflow: Bytes | None) -> Bytes:
    scaled += np.float32(half)
    np.minimum(scaled, np.float32(top), out=scaled)
    codes = scaled.astype(np.uint8)
    if overflow is not None:
        codes[:, overflow] = 0
    return codes


def _round_signed(values: Floats, low: Floats, high: Floats, kind: GgufType) -> Fields:
    # The value of largest magnitude gets code 0, the one that has no counterpart of the other sign.
    scale = signed_peak(values, low, high) / np.float32(-kind.offset)
    halves = stored(scale)
    inverse, overflow = _inverse(scale)
    codes = _truncated(values * inverse, kind.offset + 0.5, 2**kind.bits - 1, overflow)
    return Fields(codes, halves, None)


def _round_affine(values: Floats, low: Floats, high: Floats, kind: GgufType) -> Fields:
    top = 2**kind.bits - 1
    zero = np.flatnonzero(low == 0)
    if zero.size:  # the stored minimum has the sign of the first zero, which a vectorised minimum does not promise
        blocks = values[:, zero]
        low[zero] = np.take_along_axis(blocks, (blocks == 0).argmax(axis=0)[None], axis=0)[0]
    # Zeros of both signs would make it -0 where their maximum happens to be the negative one.
    scale = np.abs(high - low) / np.float32(top)
    halves = stored(scale, low)
    inverse, overflow = _inverse(scale)
    scaled = values - low
    scaled *= inverse
    return Fields(_truncated(scaled, 0.5, top, overflow), halves, None)


def _round_q8_0(values: Floats, low: Floats, high: Floats) -> Fields:
    scale = np.abs(np.maximum(high, -low)) / np.float32(127)
    halves = stored(scale)
    inverse, overflow = _inverse(scale)
    scaled = values * inverse
    away = scaled.view(np.int32) & _SIGN
    away |= _ALMOST_HALF
    scaled += away.view(np.float32)
    signed = scaled.astype(np.int8)
    if overflow is not None:
        signed[:, overflow] = 0
    codes = signed.view(np.uint8)
    codes ^= np.uint8(0x80)
    return Fields(codes, halves, None)
