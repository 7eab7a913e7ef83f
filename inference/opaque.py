"""Products that a compiler need not look into: one operator for every kernel whose weight has a layout of its own.

torch.compile takes plain tensors as inputs of a graph. Weights packed by oneDNN or FBGEMM are none, so the graph is given a
number, in a tensor, under which the kernel is kept here. One graph then serves all layers of a shape, whose numbers differ.
What stands around a product (int8 codes of the inputs, scales of the outputs, biases) stays visible and is fused.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from inference.int4 import Int4Linear
from inference.int8_product import DirectProduct, Int8Product, SplitProduct, join_parts, split_rows
from inference.linear import DenseLinear, Int8Linear, Linear
from inference.model import Block

Kernel = Callable[[Tensor], Tensor]

_KERNELS: dict[int, Kernel] = {}
_NUMBERS = itertools.count()
_LIBRARY = torch.library.Library("quantize_inference", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("product(Tensor x, Tensor number, int out_features, ScalarType dtype) -> Tensor")  # type: ignore[no-untyped-call]


def _product(x: Tensor, number: Tensor, out_features: int, dtype: torch.dtype) -> Tensor:
    return _KERNELS[int(number)](x)


def _shape(x: Tensor, number: Tensor, out_features: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], out_features), dtype=dtype)


_LIBRARY.impl("product", _product, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("quantize_inference::product", _shape, lib=_LIBRARY)


class Opaque:
    """A kernel behind the operator: what torch.compile sees of it is the shape and type of its result."""

    def __init__(self, kernel: Kernel, out_features: int, dtype: torch.dtype) -> None:
        """``kernel`` maps ``[m, in]`` to a new tensor ``[m, out_features]`` of ``dtype``; it is kept as long as this object."""
        number = next(_NUMBERS)
        _KERNELS[number] = kernel
        weakref.finalize(self, _KERNELS.pop, number)
        self.number = torch.tensor(number)
        self.out_features, self.dtype = out_features, dtype

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantize_inference.product(x, self.number, self.out_features, self.dtype)
        return out


class OpaqueLinear(Opaque):
    """A whole layer behind the operator."""

    def __init__(self, layer: Linear, dtype: torch.dtype) -> None:
        """``dtype``: the compute type."""
        super().__init__(layer, layer.out_features, dtype)
        self._layer = layer

    def nbytes(self) -> int:
        return self._layer.nbytes()


class VisibleSplit:
    """:class:`~inference.int8_product.SplitProduct` of which only FBGEMM's product is behind the operator."""

    def __init__(self, product: SplitProduct, out_features: int) -> None:
        self._kernel = Opaque(product.multiply, out_features, torch.float32)
        self._product = product

    def __call__(self, rows: Tensor) -> Tensor:
        return join_parts(self._kernel(split_rows(rows)))

    def nbytes(self) -> int:
        return self._product.nbytes()


class VisibleDirect:
    """:class:`~inference.int8_product.DirectProduct` behind the operator."""

    def __init__(self, product: DirectProduct, out_features: int) -> None:
        self._kernel = Opaque(product, out_features, torch.int32)
        self._product = product

    def __call__(self, rows: Tensor) -> Tensor:
        return self._kernel(rows)

    def nbytes(self) -> int:
        return self._product.nbytes()


def compilable(layer: Linear, dtype: torch.dtype) -> Linear:
    """``layer``, or one that computes the same on the same weights and that torch.compile can take.

    Args:
        layer: of any kind.
        dtype: the compute type.
    """
    if isinstance(layer, (DenseLinear, Int4Linear)):  # their weights are plain tensors
        return layer
    if isinstance(layer, Int8Linear):
        return _with_products(layer)
    return OpaqueLinear(layer, dtype)


def _with_products(layer: Int8Linear) -> Int8Linear:
    def visible(product: Int8Product) -> Int8Product:
        if isinstance(product, SplitProduct):
            return VisibleSplit(product, layer.out_features)
        assert isinstance(product, DirectProduct)
        return VisibleDirect(product, layer.out_features)

    twin = copy.copy(layer)
    twin._products = [visible(product) for product in layer._products]
    return twin


def compilable_block(block: Block, dtype: torch.dtype) -> Block:
    """A block of :func:`compilable` layers, on the same weights."""

    def twin(layer: Linear) -> Linear:
        return compilable(layer, dtype)

    return replace(block, qkv=twin(block.qkv), o=twin(block.o), gate_up=twin(block.gate_up), down=twin(block.down))
