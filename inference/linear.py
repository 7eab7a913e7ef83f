"""Linear layers, one class for each way a weight is stored and multiplied. All map ``[tokens, in]`` to ``[tokens, out]``.

The integer semantic is compressed-tensors' (``quantization/utils/helpers.py``, ``calculate_qparams``; symmetric int8): a row's
scale is ``max|x| / 127.5`` and its codes are ``clamp(round(x / scale), -128, 127)``, ties to even.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from inference.int8_product import DirectProduct, Int8Product, int8_product

_KERNEL_BLOCK = 64  # rows and columns torch._weight_int8pack_mm is used for come in multiples of this
_TINY = torch.finfo(torch.float32).tiny
_CHUNK_WEIGHTS = 1 << 18  # codes widened at a time: 1 MiB of float32 stays in a core's cache
_FEW_ROWS = 8  # up to here a weight-only layer multiplies digits; beyond, it widens its codes once for all rows
_LEAST = torch.tensor(_TINY)
_REACH, _REACH_3 = torch.tensor(127.5), torch.tensor(127 * 65536.0)
_PLACES = torch.tensor([65536.0, 256.0, 1.0]).view(3, 1, 1)


class Linear(Protocol):
    """What :mod:`inference.model` asks of a linear layer."""

    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, in_features]`` to ``[tokens, out_features]``, both in the compute type."""

    def nbytes(self) -> int:
        """Bytes of everything the layer holds."""


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the elements of all ``tensors`` that are there."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of each row and its scale: int8 ``[rows, columns]``, float32 ``[rows, 1]``.

    Args:
        x: finite, ``[rows, columns]``; types below float32 are widened first. A row of zeros gets codes of zero.
    """
    if x.dtype != torch.float32:
        x = x.float()
    scale = _row_scales(x, _REACH)
    # No quotient rounds below -128; 127.5 rounds to 128.
    return x.div(scale).round_().clamp_max_(127).to(torch.int8), scale


def _row_scales(x: Tensor, steps: Tensor) -> Tensor:
    """``max|x| / steps`` of each row and, since a row of zeros needs one too, a trifle: float32 ``[rows, 1]``."""
    # At one token what counts is the number of operations; torch's infinity norm is one, but slower than these two.
    largest = x.abs().amax(-1, keepdim=True)
    return torch.addcdiv(_LEAST.to(x.device), largest, steps.to(x.device))


def digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in fixed point, as int8 digits: ``x = scale * (65536 d[0] + 256 d[1] + d[2])`` to half a ``scale``.

    That is 24 bits below the row's largest magnitude, as many as float32 itself has, and integer products can work on them.

    Args:
        x: finite, float32 ``[rows, columns]``.

    Returns:
        int8 ``[3, rows, columns]`` and float32 ``[rows, 1]``.
    """
    scale = _row_scales(x, _REACH_3)
    whole = x.div(scale).round_().to(torch.int32)
    parts = []
    for _ in range(2):
        part = whole.bitwise_left_shift(24).bitwise_right_shift_(24).to(torch.int8)  # the lowest byte, with its sign
        parts.append(part)
        whole = whole.sub_(part).bitwise_right_shift_(8)
    return torch.stack([whole.to(torch.int8), *reversed(parts)]), scale


class DenseLinear:
    """A weight in the compute type, multiplied by torch's own product."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """``weight`` ``[out_features, in_features]``, ``bias`` ``[out_features]``, both in the compute type."""
        self.out_features = weight.shape[0]
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)

    def nbytes(self) -> int:
        return tensor_bytes(self._weight, self._bias)


class PackedLinear:
    """A float32 weight in the layout oneDNN chooses: the numbers of :class:`DenseLinear`, about twice as fast on some CPUs.

    torch sends float32 products to MKL, which is slow on processors that are not Intel's; Inductor packs this way for them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """``weight`` as for :class:`DenseLinear`, float32 or narrower; see :func:`packed_fits` for where this runs."""
        self.out_features = weight.shape[0]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.float().contiguous(), 1)
        self._bytes = 4 * weight.numel() + tensor_bytes(bias)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out

    def nbytes(self) -> int:
        return self._bytes


def packed_fits(weight: Tensor, compute: torch.dtype) -> bool:
    """Whether :class:`PackedLinear` runs here for this weight."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return compute == torch.float32 and weight.device.type == "cpu" and bool(available)


class HalfStoredLinear:
    """A float16 weight under float32 arithmetic: half the bytes of :class:`DenseLinear`, the same numbers.

    FBGEMM's kernel widens the weight in registers, so products and sums are float32; x86 CPUs only.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """``weight`` as for :class:`DenseLinear`; see :func:`half_stored_fits` for which weights keep their values."""
        self.out_features = weight.shape[0]
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), None)
        self._bytes = 2 * weight.numel() + tensor_bytes(bias)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
        return out if self._bias is None else out.add_(self._bias)

    def nbytes(self) -> int:
        return self._bytes


def half_stored_fits(weight: Tensor, compute: torch.dtype) -> bool:
    """Whether :class:`HalfStoredLinear` runs here and gives exactly this weight's values."""
    if compute != torch.float32 or weight.device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    return weight.dtype == torch.float16 or bool(torch.equal(weight.half().float(), weight.float()))


class Int8WeightOnlyLinear:
    """W8A16: int8 codes, scales per channel or per group, activations as they are."""

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> None:
        """``codes`` int8 ``[out, in]``, ``scales`` ``[out, groups]`` for groups of consecutive columns, ``bias`` ``[out]``."""
        self.out_features = codes.shape[0]
        self._codes, self._scales, self._bias = codes, scales.float(), bias
        self._row_scales = self._scales[:, 0] if self._scales.shape[1] == 1 else None
        # torch's bfloat16 kernel reads past the end of matrices that do not fill its blocks.
        whole = codes.shape[0] % _KERNEL_BLOCK == codes.shape[1] % _KERNEL_BLOCK == 0
        self._kernel_fits = whole and codes.device.type == "cpu"
        digits_fit = codes.device.type == "cpu" and self._row_scales is not None
        self._product = int8_product(codes) if digits_fit else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._kernel_fits and self._row_scales is not None and x.dtype == torch.bfloat16:
            ones = x.new_ones(self.out_features)  # its own scales are bfloat16, which would round ours
            out = torch._weight_int8pack_mm(x, self._codes, ones).mul(self._row_scales).to(x.dtype)
        elif self._product is not None and len(x) <= _FEW_ROWS and x.dtype == torch.float32:
            out = self._from_digits(x, self._product)
        else:
            out = torch.cat([self._rows(x, start) for start in range(0, self.out_features, self._chunk())], -1)
        return out if self._bias is None else out.add_(self._bias)

    def _from_digits(self, x: Tensor, integer: Int8Product) -> Tensor:
        """Decode: the weight is read once, as int8, and nothing is widened."""
        parts, scale = digits(x)
        product = integer(parts.view(-1, x.shape[1])).view(3, len(x), -1)
        assert self._row_scales is not None
        return product.mul(_PLACES).sum(0).mul_(self._row_scales).mul_(scale)

    def _chunk(self) -> int:
        on_cpu = self._codes.device.type == "cpu"
        return max(1, _CHUNK_WEIGHTS // self._codes.shape[1]) if on_cpu else self.out_features

    def _rows(self, x: Tensor, start: int) -> Tensor:
        codes = self._codes[start : start + self._chunk()]
        if self._row_scales is not None:
            # A code is exact in every compute type, so the scale can wait until after the product.
            scales = self._row_scales[start : start + self._chunk()]
            return functional.linear(x, codes.to(x.dtype)).mul(scales).to(x.dtype)
        scales = self._scales[start : start + self._chunk(), :, None]
        weight = codes.float().view(*scales.shape[:2], -1).mul_(scales).view(codes.shape)
        return functional.linear(x, weight.to(x.dtype))

    def nbytes(self) -> int:
        copied = 0 if self._product is None or isinstance(self._product, DirectProduct) else self._product.nbytes()
        return tensor_bytes(self._codes, self._scales, self._bias) + copied


class Int8Linear:
    """W8A8: int8 codes times int8 activations, summed exactly, rescaled to the compute type.

    Activations have one scale a token, found at run time (dynamic), or one for the layer, stored with it (static).
    """

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None) -> None:
        """As :class:`Int8WeightOnlyLinear`; ``input_scale`` of one element makes the layer static."""
        self.out_features = codes.shape[0]
        self._bias = bias
        self._input_scale = None if input_scale is None else input_scale.float().view(1, 1)
        self._rescale = scales.float().t().contiguous()  # [groups, out]
        groups = len(self._rescale)
        self._products = [int8_product(part.contiguous()) for part in codes.chunk(groups, 1)]

    def __call__(self, x: Tensor) -> Tensor:
        if self._input_scale is None:
            codes, scale = quantize_rows(x)
        else:
            scale = self._input_scale
            codes = x.float().div(scale).round_().clamp_(-128, 127).to(torch.int8)
        out = self._product(codes).mul_(scale)
        if x.dtype != torch.float32:
            out = out.to(x.dtype)
        return out if self._bias is None else out.add_(self._bias)

    def _product(self, codes: Tensor) -> Tensor:
        if len(self._products) == 1:
            return self._products[0](codes) * self._rescale
        total = codes.new_zeros((), dtype=torch.float32)
        for product, part, scales in zip(self._products, codes.chunk(len(self._products), 1), self._rescale, strict=True):
            total = total + product(part.contiguous()) * scales
        return total

    def nbytes(self) -> int:
        held = tensor_bytes(self._rescale, self._bias, self._input_scale)
        return held + sum(product.nbytes() for product in self._products)


class SideBySide:
    """Layers that share an input but not a kind, run one after the other; their outputs are put side by side.

    Attributes:
        layers: in their outputs' order.
    """

    def __init__(self, layers: list[Linear]) -> None:
        """``layers`` of equal ``in_features``; the output is theirs in order."""
        self.out_features = sum(layer.out_features for layer in layers)
        self.layers = layers

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)

    def nbytes(self) -> int:
        return sum(layer.nbytes() for layer in self.layers)
