"""Layers whose numbers lie in memory as they are, row after row, so that C++ can walk over them.

A whole step on one token is :mod:`inference.native.step`'s business. Called with a few tokens, as in batches and when guesses
are checked, they are multiplied in C++, each weight read once for all; a token's numbers do not depend on those beside it.
Called with many, as in prefill, they are multiplied by torch: what is narrower than float32 is widened some rows at a time,
which a product over many tokens makes up for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from inference.int4 import Int4Codes
from inference.linear import DenseLinear, Int8Linear, Linear, tensor_bytes
from inference.native.build import library
from inference.native.structures import LINEAR

# The order of product.hpp's Kind.
FLOAT32, FLOAT16, INT8_WEIGHT, INT8, INT4, INT4_MIDDLE = range(6)
BLOCK = 32  # inputs of a 4-bit layer that share a scale
_MIDDLE = 8
_SCALES_AT_ONCE = 8
_CHUNK_WEIGHTS = 1 << 20
FEW_TOKENS = 16  # more are quicker in torch's products


class NativeLinear:
    """A weight in one of product.hpp's kinds. Float32 activations, CPU only.

    Attributes:
        kind: of ``weight``.
        out_features, in_features: of the layer.
        group: columns that share a scale.
        weight, scales, minima, bias, order: as in product.hpp's ``Linear``; None where a kind has none.
        input_scale: of static int8 activations, else 0.
    """

    def __init__(
        self,
        kind: int,
        shape: tuple[int, int],
        weight: Tensor,
        rows: Callable[[int, int], Tensor] | None = None,
        many: Linear | None = None,
        group: int = 0,
        scales: Tensor | None = None,
        minima: Tensor | None = None,
        bias: Tensor | None = None,
        order: Tensor | None = None,
        input_scale: float = 0.0,
    ) -> None:
        """Either ``rows`` gives a range of the weight in float32 for many tokens, or ``many`` is the layer they go through."""
        self.kind, self.group, self.input_scale = kind, group or shape[1], input_scale
        self.out_features, self.in_features = shape
        self.weight, self.scales, self.minima, self.order = weight, scales, minima, order
        self.bias = None if bias is None else bias.float().contiguous()
        self._rows, self._many = rows, many

    @cached_property
    def described(self) -> Any:
        """product.hpp's ``Linear``; this object must outlive it."""
        tensors = (self.weight, self.scales, self.minima, self.bias, self.order)
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        return LINEAR(self.kind, self.out_features, self.in_features, self.group, *addresses, self.input_scale)

    def few(self, x: Tensor) -> Tensor:
        """The product in C++: float32 ``[tokens, in_features]`` to ``[tokens, out_features]``."""
        x, out = x.contiguous(), torch.empty(len(x), self.out_features)
        described = ctypes.byref(self.described)
        library().multiply(described, x.data_ptr(), len(x), out.data_ptr(), torch.get_num_threads())
        return out

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) <= FEW_TOKENS:
            return self.few(x)
        if self._many is not None:
            return self._many(x)
        if self.order is not None:
            x = x[:, self.order]
        size = max(1, _CHUNK_WEIGHTS // self.in_features)
        assert self._rows is not None
        parts = [functional.linear(x, self._rows(start, start + size)) for start in range(0, self.out_features, size)]
        out = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return out if self.bias is None else out.add_(self.bias)

    def nbytes(self) -> int:
        """Bytes held, the copy for many tokens included."""
        # In float32 it is the same memory.
        held = tensor_bytes(self.weight, self.scales, self.minima, self.bias, self.order)
        return held + (0 if self._many is None or self.kind == FLOAT32 else self._many.nbytes())


def dense(weight: Tensor, bias: Tensor | None, half: bool) -> NativeLinear:
    """A floating weight ``[out, in]``, held in float16 where ``half`` (which must lose nothing), else in float32."""
    kept = weight.to(torch.float16 if half else torch.float32).contiguous()
    shape = (kept.shape[0], kept.shape[1])
    if not half:
        return NativeLinear(FLOAT32, shape, kept, many=DenseLinear(kept, bias), bias=bias)
    return NativeLinear(FLOAT16, shape, kept, lambda start, stop: kept[start:stop].float(), bias=bias)


def int8_weight_only(codes: Tensor, scales: Tensor, bias: Tensor | None) -> NativeLinear:
    """As :class:`~inference.linear.Int8WeightOnlyLinear`."""
    codes, scales = codes.contiguous(), scales.float().contiguous()
    group = codes.shape[1] // scales.shape[1]

    def rows(start: int, stop: int) -> Tensor:
        part = codes[start:stop].float()
        return part.view(len(part), -1, group).mul_(scales[start:stop, :, None]).view(len(part), -1)

    return NativeLinear(INT8_WEIGHT, (codes.shape[0], codes.shape[1]), codes, rows, group=group, scales=scales, bias=bias)


def int8(codes: Tensor, scales: Tensor, bias: Tensor | None, input_scale: Tensor | None = None) -> NativeLinear:
    """As :class:`~inference.linear.Int8Linear`, which is kept beside it for many tokens."""
    many = Int8Linear(codes, scales, bias, input_scale)
    codes, scales = codes.contiguous(), scales.float().contiguous()
    group = codes.shape[1] // scales.shape[1]
    static = 0.0 if input_scale is None else float(input_scale)
    shape = (codes.shape[0], codes.shape[1])
    return NativeLinear(INT8, shape, codes, many=many, group=group, scales=scales, bias=bias, input_scale=static)


def _padded(scales: Tensor) -> Tensor:
    """The same with room behind it, because product.hpp reads scales eight at a time."""
    room = torch.zeros(scales.numel() + _SCALES_AT_ONCE, dtype=scales.dtype)
    return room[: scales.numel()].view_as(scales).copy_(scales)


def int4(codes: Int4Codes, bias: Tensor | None) -> NativeLinear:
    """A 4-bit layer, two codes a byte in GGUF's order: 16 bytes hold codes 0 to 15 of a block, and above them 16 to 31.

    For few tokens, inputs are rounded to 8 bits by blocks of 32, as llama.cpp does; for more they are left alone.
    """
    blocks = codes.codes.view(len(codes.codes), -1, 2, BLOCK // 2)
    packed = (blocks[:, :, 0] | blocks[:, :, 1] << 4).contiguous()
    minima, scales = codes.minima.contiguous(), _padded(codes.scales)
    half = _padded(scales.half())
    middle = bool(torch.equal(half.float(), scales)) and bool(torch.equal(minima, -_MIDDLE * scales))
    size = codes.group_size

    def rows(start: int, stop: int) -> Tensor:
        part = packed[start:stop]
        unpacked = torch.stack((part & 15, part >> 4), 2).view(len(part), -1, size).float()
        return unpacked.mul_(scales_of(start, stop)).add_(minima_of(start, stop)).view(len(part), -1)

    def scales_of(start: int, stop: int) -> Tensor:
        return (half if middle else scales)[start:stop, :, None].float()

    def minima_of(start: int, stop: int) -> Tensor:
        return -_MIDDLE * scales_of(start, stop) if middle else minima[start:stop, :, None]

    return NativeLinear(
        INT4_MIDDLE if middle else INT4,
        (codes.codes.shape[0], codes.codes.shape[1]),
        packed,
        rows,
        group=size,
        scales=half if middle else scales,
        minima=None if middle else minima,
        bias=bias,
        order=None if codes.order is None else codes.order.contiguous(),
    )
