"""Exact products of int8 rows with an int8 weight, by the kernel that is fast on this processor.

Processors with VNNI multiply bytes in one instruction, and ``torch._int_mm`` uses it; elsewhere it is slower than float32.
Before VNNI there is only ``vpmaddubsw``, which adds two products of an unsigned and a signed byte in 16 bits and saturates.
FBGEMM's int8 kernel is built on it, and is exact as long as the unsigned side stays below 128. So a row is split,
``x = 2 (x >> 1) + (x & 1)``, and goes through that kernel as two rows of 7 bits. The weight is still read once.
"""

from __future__ import annotations

import warnings
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from quantize.errors import InputError

_CUDA_LEAST_ROWS = 17  # torch._int_mm refuses fewer on CUDA
_LOW, _HIGH = -64.0, 63.0  # what x >> 1 reaches; 127 steps of exactly 1, so FBGEMM's run-time scale is 1


class Int8Product(Protocol):
    """A weight, ready to be multiplied."""

    def __call__(self, rows: Tensor) -> Tensor:
        """int8 ``[m, in]`` to ``[m, out]``: int32, or float32 where sums above 2^24 are rounded once."""

    def nbytes(self) -> int:
        """Bytes held."""


def int8_product(codes: Tensor) -> Int8Product:
    """The product with int8 ``codes`` ``[out, in]`` that suits their device.

    Raises:
        InputError: a device without an integer product.
    """
    return SplitProduct(codes) if codes.device.type == "cpu" and split_is_faster() else DirectProduct(codes)


def split_is_faster() -> bool:
    """Whether this processor lacks byte products while FBGEMM is there."""
    vnni = torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()
    return not vnni and "fbgemm" in torch.backends.quantized.supported_engines


class DirectProduct:
    """By ``torch._int_mm``."""

    def __init__(self, codes: Tensor) -> None:
        """``codes`` int8 ``[out, in]``; kept, not copied."""
        self._codes = codes
        plain = codes.device.type == "cpu" and codes.shape[1] > 1
        self._transposed = codes.t() if plain else None  # what int8_matmul would multiply by, found once

    def __call__(self, rows: Tensor) -> Tensor:
        return int8_matmul(rows, self._codes) if self._transposed is None else torch._int_mm(rows, self._transposed)

    def nbytes(self) -> int:
        return self._codes.numel()


class SplitProduct:
    """By FBGEMM in two rows of 7 bits for each row of 8; CPUs of x86 only."""

    def __init__(self, codes: Tensor) -> None:
        """``codes`` int8 ``[out, in]``; copied into the kernel's layout."""
        # Two columns of zeros meet the constants that force the range of FBGEMM's run-time quantization.
        padded = functional.pad(codes, (0, 2))
        ones = torch.ones(len(codes), dtype=torch.double)
        zeros = torch.zeros(len(codes), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            weight = torch._make_per_channel_quantized_tensor(padded, ones, zeros, 0)
        self._packed = torch.ops.quantized.linear_prepack(weight, None)
        self._bytes = padded.numel()

    def __call__(self, rows: Tensor) -> Tensor:
        return join_parts(self.multiply(split_rows(rows)))

    def multiply(self, parts: Tensor) -> Tensor:
        """FBGEMM's product, float32 ``[2 m, out]``, with what :func:`split_rows` made of ``m`` rows."""
        out: Tensor = torch.ops.quantized.linear_dynamic(parts, self._packed, True)
        return out

    def nbytes(self) -> int:
        return self._bytes


def split_rows(rows: Tensor) -> Tensor:
    """int8 ``[m, in]`` to float32 ``[2 m, in + 2]``: the upper 7 bits of all rows, the lowest bits, and the range's ends."""
    count, columns = rows.shape
    parts = rows.new_empty((2 * count, columns + 2), dtype=torch.float32)
    parts[:count, :columns] = rows.bitwise_right_shift(1)
    parts[count:, :columns] = rows.bitwise_and(1)
    parts[:, columns] = _LOW
    parts[:, columns + 1] = _HIGH
    return parts


def join_parts(out: Tensor) -> Tensor:
    """The product of whole rows, ``[m, out]``, from that of their parts."""
    count = len(out) // 2
    return torch.add(out[count:], out[:count], alpha=2)


def int8_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of int8 ``[m, k]`` and ``[n, k]`` in exact int32 ``[m, n]``.

    Raises:
        InputError: a device without an integer product.
    """
    if left.device.type == "cpu":
        if left.shape[1] == 1:  # torch 2.13 misreads the strides of a transposed single column
            left, right = functional.pad(left, (0, 1)), functional.pad(right, (0, 1))
        return torch._int_mm(left, right.t())
    if left.device.type == "cuda":
        return int8_matmul_padded(left, right)
    raise InputError(f"device={left.device.type} has no int8 matrix product; use device=cpu or device=cuda for int8 artifacts")


def int8_matmul_padded(left: Tensor, right: Tensor) -> Tensor:
    """:func:`int8_matmul` by way of shapes that CUDA takes: more than 16 rows, widths in multiples of 8."""
    (m, k), n = left.shape, right.shape[0]
    rows, depth, columns = max(m, _CUDA_LEAST_ROWS), -k % 8, -n % 8
    left = functional.pad(left, (0, depth, 0, rows - m))
    if depth or columns:
        right = functional.pad(right, (0, depth, 0, columns))
    return torch._int_mm(left, right.t())[:m, :n]
