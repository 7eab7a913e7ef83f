"""What a container makes of a linear layer, in bytes: codes, scales, zero points."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from quantize.grids import Grid


@dataclass(frozen=True)
class VariantSpec:
    """A variant, as far as its memory is concerned.

    Attributes:
        name: as the table shows it.
        container: ``safetensors`` (not quantized), ``gptq``, ``int-quantized`` or ``pack-quantized`` (both of
            compressed-tensors), ``nf4`` or ``llm-int8`` (both of bitsandbytes).
        bits: of a code.
        group_size: input columns that share a scale; -1 for the whole row. nf4: weights that share one, across rows.
        symmetric: no zero points besides those the container has anyway.
        dtype: of dense tensors and of arithmetic; None: the checkpoint's.
        int8_inputs: the layers' inputs are rounded to int8 (W8A8).
    """

    name: str
    container: str = "safetensors"
    bits: int = 16
    group_size: int = -1
    symmetric: bool = True
    dtype: str | None = None
    int8_inputs: bool = False


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's tensors, by what they are.

    Attributes:
        codes: the matrices inside the blocks: codes, or values where they are not quantized.
        scales: their scales.
        zeros: their zero points.
        g_idx: the group of each of their input columns.
        embeddings: token embedding and ``lm_head``, once where they are tied.
        dense: all the rest: norms, biases, routers, tables.
        unpacked: what the program keeps beside them: GPTQModel's torch kernel its unpacked zero points and 64-bit ``g_idx``.
    """

    codes: int = 0
    scales: int = 0
    zeros: int = 0
    g_idx: int = 0
    embeddings: int = 0
    dense: int = 0
    unpacked: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))

    def __add__(self, other: Weights) -> Weights:
        return Weights(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def times(self, count: int) -> Weights:
        """As many bytes ``count`` times."""
        return Weights(*(getattr(self, field.name) * count for field in dataclasses.fields(self)))


def groups(spec: VariantSpec, columns: int) -> int:
    """Groups in a row of ``columns`` weights."""
    return 1 if spec.group_size == -1 else columns // spec.group_size


def _dense(_: VariantSpec, rows: int, columns: int, element: int) -> Weights:
    return Weights(codes=rows * columns * element)


def _gptq(spec: VariantSpec, rows: int, columns: int, _: int) -> Weights:
    """``exports.gptq``: codes and zero points packed into int32, float16 scales, an int32 for each column."""
    Grid(spec.bits, spec.group_size).check_divides(f"a layer of shape [{rows}, {columns}]", columns)
    count = groups(spec, columns)
    return Weights(
        codes=columns * spec.bits // 32 * 4 * rows,
        scales=count * rows * 2,
        zeros=count * (rows * spec.bits // 32 * 4),
        g_idx=columns * 4,
    )


def _int_quantized(spec: VariantSpec, rows: int, columns: int, element: int) -> Weights:
    """compressed-tensors: a code a byte."""
    return Weights(codes=rows * columns, scales=groups(spec, columns) * rows * element)


def _pack_quantized(spec: VariantSpec, rows: int, columns: int, element: int) -> Weights:
    """compressed-tensors: rows of codes packed into int32, and the shape in two int64."""
    Grid(spec.bits, spec.group_size).check_divides(f"a layer of shape [{rows}, {columns}]", columns)
    count = groups(spec, columns)
    zeros = 0 if spec.symmetric else math.ceil(rows * spec.bits / 32) * 4 * count
    return Weights(
        codes=rows * math.ceil(columns * spec.bits / 32) * 4, scales=count * rows * element, zeros=zeros, dense=2 * 8
    )


def _nf4(spec: VariantSpec, rows: int, columns: int, _: int) -> Weights:
    """bitsandbytes: two codes a byte, a float32 maximum for each block of weights, and the 16 values (QLoRA, section 3)."""
    return Weights(codes=math.ceil(rows * columns / 2), scales=math.ceil(rows * columns / spec.group_size) * 4, dense=16 * 4)


def _llm_int8(_: VariantSpec, rows: int, columns: int, __: int) -> Weights:
    """bitsandbytes: ``CB``, a code a byte, and ``SCB``, a float32 for each row."""
    return Weights(codes=rows * columns, scales=rows * 4)


CONTAINERS: dict[str, Callable[[VariantSpec, int, int, int], Weights]] = {
    "safetensors": _dense,
    "gptq": _gptq,
    "int-quantized": _int_quantized,
    "pack-quantized": _pack_quantized,
    "nf4": _nf4,
    "llm-int8": _llm_int8,
}


def variants(group_size: int = 64, dtype: str | None = None) -> tuple[VariantSpec, ...]:
    """The variants of the table; ``group_size`` is int4's, ``dtype`` that of the quantized ones' other tensors."""
    return (
        VariantSpec("fp32", dtype="float32"),
        VariantSpec("fp16", dtype="float16"),
        VariantSpec("bf16", dtype="bfloat16"),
        VariantSpec("int8", "pack-quantized", bits=8, dtype=dtype),
        VariantSpec("int8-dynamic", "int-quantized", bits=8, dtype=dtype, int8_inputs=True),
        VariantSpec("int4", "gptq", bits=4, group_size=group_size, symmetric=False, dtype=dtype),
        VariantSpec("nf4", "nf4", bits=4, group_size=64, dtype=dtype),
        VariantSpec("llm-int8", "llm-int8", bits=8, dtype=dtype),
    )
