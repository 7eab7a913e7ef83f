"""llama.cpp's tensor types in numpy: weights to blocks and back, and codes and scales in and out of blocks.

``quantize`` gives the bytes of ``llama-quantize`` run without an importance matrix, ``dequantize`` the values llama.cpp reads.
``pack`` and ``unpack`` are the way in and out for codes chosen elsewhere. Formats: llama.cpp's ``ggml/src/ggml-common.h`` and
``ggml-quants.c``. Byte identity is with ggml as its CMake files build it on x86-64 (ggml-base without fused multiply-add).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from exports import gguf_kquants, gguf_layout, gguf_rounding
from exports.gguf_layout import TYPES, Bytes, Factors, Fields, Floats, GgufType, Halves

__all__ = ["TYPES", "Blocks", "GgufType", "dequantize", "kind_of", "pack", "quantize", "unpack"]

# Weights handled at once: what the passes over them touch stays in a core's second-level cache.
SLICE = 2**16
# How the dense types are read: float16 and bfloat16 as bits.
_NUMBERS = {"F32": "<f4", "F16": "<u2", "BF16": "<u2"}
# How far a scale may be from an integer times its super scale, relative: a few roundings of float32.
_SLACK = np.float32(1e-6)


class Blocks(NamedTuple):
    """A matrix of blocks, taken apart: ``weight = scale * code + minimum`` of the weight's group.

    codes: uint8 ``[rows, cols]``. scales, minima: float32 ``[rows, groups]``. The last two are those of k-quants, else None:
    supers: float16 ``[rows, blocks, 1 or 2]``. factors: int16 ``[rows, groups, 1 or 2]``, by which supers are multiplied.
    """

    codes: Bytes
    scales: Floats
    minima: Floats
    supers: Halves | None
    factors: Factors | None = None


def kind_of(name: str) -> GgufType:
    """The type of that name.

    Raises:
        ValueError: there is no such type here.
    """
    if name not in TYPES:
        raise ValueError(f"{name!r} is no tensor type known here; known are {', '.join(TYPES)}")
    return TYPES[name]


def quantize(values: Floats, kind: str) -> Bytes:
    """Weights in blocks, as ``llama-quantize`` without an importance matrix makes them.

    Args:
        values: float32 ``[..., cols]``, finite.
        kind: a name in :data:`TYPES`.

    Returns:
        uint8 ``[..., row_bytes]``.

    Raises:
        ValueError: ``cols`` is not a multiple of the block size, a value is not finite, or a scale does not fit in float16.
    """
    described = kind_of(kind)
    out = np.empty((*values.shape[:-1], described.row_bytes(values.shape[-1])), np.uint8)
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    quantize_into(flat, described, out.reshape(-1))
    return out


def quantize_into(values: Floats, kind: GgufType, out: Bytes) -> None:
    """:func:`quantize` for weights in a row: float32 ``[n]`` into uint8 ``[n / block_size * type_size]``, both contiguous."""
    convert_into(values.astype("<f4", copy=False).view(np.uint8), TYPES["F32"], kind, out)


def convert_into(data: Bytes, source: GgufType, kind: GgufType, out: Bytes) -> None:
    """Weights in a row from a dense type to any: uint8 ``[n * source.type_size]`` into uint8 ``[n / block_size * type_size]``.

    Raises:
        ValueError: as :func:`quantize`.
    """
    for start in range(0, len(data) // source.type_size, SLICE):
        part = data[start * source.type_size : (start + SLICE) * source.type_size]
        place = out[start // kind.block_size * kind.type_size : (start + SLICE) // kind.block_size * kind.type_size]
        numbers = part.view(_NUMBERS[source.name])
        if kind.dense:
            place[:] = _narrowed(_widened(numbers, source), kind)
            continue
        # Transposed while they are narrow, so that what follows runs along blocks.
        groups = _widened(np.ascontiguousarray(numbers.reshape(-1, kind.group_size).T), source)
        rounder = gguf_kquants.search_blocks if kind.super_blocks else gguf_rounding.round_blocks
        gguf_layout.join(rounder(groups, kind), kind, place.reshape(-1, kind.type_size))


def _widened(numbers: npt.NDArray[Any], kind: GgufType) -> Floats:
    """Stored numbers as float32 of the same shape.

    Raises:
        ValueError: a float16 is not finite.
    """
    if kind.name == "F32":
        return numbers.view("<f4").astype(np.float32, copy=False)
    if kind.name == "BF16":
        shifted: Floats = np.left_shift(numbers, 16, dtype=np.uint32).view(np.float32)
        return shifted
    if numbers.size and int((numbers & np.uint16(0x7FFF)).max()) >= 0x7C00:
        raise ValueError("values are not finite")
    # The exponent and fraction in float32's places, the sign where it is; 2**112 is the ratio of the exponents' biases. Exact,
    # subnormal numbers included, and several times faster than numpy's own conversion, which goes number by number.
    words = np.left_shift(numbers.view(np.int16), 16, dtype=np.int32)
    words >>= np.int32(3)
    words &= np.int32(-0x70000001)
    values = words.view(np.float32)
    values *= np.float32(2.0**112)
    return values


def _narrowed(values: Floats, kind: GgufType) -> Bytes:
    if not np.isfinite(values).all():
        raise ValueError("values are not finite")
    if kind.name == "F32":
        return values.astype("<f4", copy=False).view(np.uint8)
    if kind.name == "BF16":
        words, half = values.view(np.uint32), np.uint32(16)
        even = words >> half & np.uint32(1)  # ties to even
        return ((words + (np.uint32(0x7FFF) + even)) >> half).astype("<u2").view(np.uint8)
    with np.errstate(over="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        raise ValueError("values exceed 65504, the largest float16")
    return halves.view(np.uint8)


def dequantize(data: Bytes, kind: str) -> Floats:
    """The weights that llama.cpp reads from blocks, to the bit.

    Args:
        data: uint8 ``[..., row_bytes]``.
        kind: a name in :data:`TYPES`.

    Returns:
        float32 ``[..., cols]``.

    Raises:
        ValueError: ``row_bytes`` is not a multiple of the block's bytes.
    """
    described = kind_of(kind)
    shape = (*data.shape[:-1], described.columns(data.shape[-1]))
    if described.dense:
        numbers = np.ascontiguousarray(data).view(_NUMBERS[kind]).reshape(shape)
        return numbers.view("<f2").astype(np.float32) if kind == "F16" else _widened(numbers, described).copy()
    codes, halves, factors = gguf_layout.split(np.ascontiguousarray(data).reshape(-1, described.type_size), described)
    numbers = _products(halves, factors)[:, :, None]
    grouped = codes.reshape(-1, described.group_size, codes.shape[1])
    values = (grouped.astype(np.int16) - np.int16(described.offset)).astype(np.float32)
    values *= numbers[0]
    if described.supers == 2:
        # k-quants subtract their minimum, the blocks of 32 add it.
        values += -numbers[1] if described.super_blocks else numbers[1]
    return np.ascontiguousarray(values.reshape(described.block_size, -1).T).reshape(shape)


def _products(halves: Halves, factors: Factors | None) -> Floats:
    """Scales (and minima) of all groups: float32 ``[supers, groups of a block, n]``; exact, for 11 bits times 8."""
    supers = halves.astype(np.float32)[:, None]
    return supers if factors is None else supers * factors.astype(np.float32)


def unpack(data: Bytes, kind: str) -> Blocks:
    """Codes and scales of a matrix of blocks.

    Products of stored numbers are exact in float32, so ``scales * codes + minima`` in float32 equals :func:`dequantize`; only a
    zero may have the other sign.

    Args:
        data: uint8 ``[rows, row_bytes]``.
        kind: a type with codes.

    Raises:
        ValueError: the type has no codes, or ``row_bytes`` is not a multiple of the block's bytes.
    """
    described = _with_codes(kind)
    rows, columns = len(data), described.columns(data.shape[-1])
    fields = gguf_layout.split(np.ascontiguousarray(data).reshape(-1, described.type_size), described)
    numbers = _products(fields.halves, fields.factors)
    scales = numbers[0].T.reshape(rows, -1)
    if described.supers == 1:
        minima = scales * np.float32(-described.offset)
    else:
        minima = (-numbers[1] if described.super_blocks else numbers[1]).T.reshape(rows, -1)
    codes = np.ascontiguousarray(fields.codes.T).reshape(rows, columns)
    if fields.factors is None:
        return Blocks(codes, scales, minima, None)
    halves = fields.halves.T.reshape(rows, columns // described.block_size, -1)
    factors = fields.factors.transpose(2, 1, 0).reshape(rows, -1, described.supers)
    return Blocks(codes, scales, minima, halves, factors)


def pack(
    codes: Bytes, scales: Floats, minima: Floats, supers: Halves | None, kind: str, factors: Factors | None = None
) -> Bytes:
    """Inverse of :func:`unpack`: blocks from codes and scales chosen elsewhere.

    Args:
        codes: uint8 ``[rows, cols]`` below ``2**bits`` (Q8_0: the signed code plus 128).
        scales: float32 ``[rows, groups]``: numbers of float16 or, in k-quants, integers times ``supers[..., 0]``.
        minima: float32 ``[rows, groups]``: what code 0 stands for. Types without minima: ``-offset * scales``; Q4_1 and Q5_1:
            numbers of float16; Q4_K and Q5_K: minus an integer times ``supers[..., 1]``.
        supers: float16 ``[rows, blocks, 1 or 2]`` for k-quants.
        kind: a type with codes.
        factors: int16 ``[rows, groups, 1 or 2]``; needed only to restore those of a k-quant whose super is 0, where they
            cannot be recovered from scales and minima. Other blocks are checked against them.

    Returns:
        uint8 ``[rows, row_bytes]``.

    Raises:
        ValueError: shapes do not fit each other, or a number cannot be stored exactly (k-quants: to within float32 rounding).
    """
    described = _with_codes(kind)
    rows, columns = codes.shape
    out = np.empty((rows, described.row_bytes(columns)), np.uint8)
    groups = columns // described.group_size
    for name, array in (("scales", scales), ("minima", minima)):
        if array.shape != (rows, groups):
            raise ValueError(f"{kind} of {rows} x {columns} weights needs {name} {(rows, groups)}, not {array.shape}")
    if codes.size and int(codes.max()) >> described.bits:
        raise ValueError(f"code {int(codes.max())} does not fit in the {described.bits} bits of {kind}")
    if described.super_blocks:
        halves, factors = _integer_factors(scales, minima, supers, described, factors)
    else:
        halves = _exact_halves(scales, minima, described)
    halves = halves.reshape(-1, described.supers)
    stored = None if factors is None else factors.reshape(len(halves), -1, described.supers).transpose(2, 1, 0)
    columns_of = np.ascontiguousarray(codes.reshape(-1, described.block_size).T)
    gguf_layout.join(Fields(columns_of, halves.T, stored), described, out.reshape(-1, described.type_size))
    return out


def _with_codes(kind: str) -> GgufType:
    described = kind_of(kind)
    if described.dense:
        raise ValueError(f"{kind} stores weights themselves: it has no codes")
    return described


def _exact_halves(scales: Floats, minima: Floats, kind: GgufType) -> Halves:
    with np.errstate(over="ignore"):
        numbers = np.stack((scales, minima), axis=2)[:, :, : kind.supers]
        halves = numbers.astype(np.float16)
    if not np.array_equal(halves.astype(np.float32), numbers):
        raise ValueError(f"{kind.name} stores scales and minima as float16: round them before the weights are rounded")
    if kind.supers == 1 and not np.array_equal(minima, scales * np.float32(-kind.offset)):
        raise ValueError(f"{kind.name} has no minima: they must be {-kind.offset} times the scales")
    return halves


def _integer_factors(
    scales: Floats, minima: Floats, supers: Halves | None, kind: GgufType, given: Factors | None
) -> tuple[Halves, Factors]:
    rows, groups = scales.shape
    blocks = groups * kind.group_size // kind.block_size
    if supers is None or supers.shape != (rows, blocks, kind.supers):
        found = None if supers is None else supers.shape
        raise ValueError(f"{kind.name} needs supers {(rows, blocks, kind.supers)}, not {found}")
    if not np.isfinite(supers).all():
        raise ValueError(f"{kind.name}'s supers must be finite")
    if kind.supers == 1 and not np.allclose(minima, scales * np.float32(-kind.offset), rtol=_SLACK, atol=0):
        raise ValueError(f"{kind.name} has no minima: they must be {-kind.offset} times the scales")
    numbers = np.stack((scales, -minima), axis=2)[:, :, : kind.supers]
    steps = np.repeat(supers.astype(np.float32), groups // max(blocks, 1), axis=1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotients = np.where(steps == 0, np.float32(0), numbers / steps)
    low, high = (-128, 127) if kind.supers == 1 else (0, 63)
    integers = np.clip(np.rint(quotients), low, high)
    if given is not None:
        if given.shape != integers.shape or int(given.min(initial=0)) < low or int(given.max(initial=0)) > high:
            raise ValueError(f"{kind.name} needs factors {integers.shape} from {low} to {high}")
        integers = np.where(steps == 0, given, integers)
        if not np.array_equal(integers, given):
            raise ValueError(f"{kind.name}'s factors are not the scales and minima divided by the supers")
    if not np.allclose(integers * steps, numbers, rtol=_SLACK, atol=0):
        raise ValueError(f"{kind.name} stores scales and minima as integers from {low} to {high} times supers: these are not")
    return supers, integers.astype(np.int16)
