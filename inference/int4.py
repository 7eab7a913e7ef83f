"""Four-bit layers that stay four bits wide in memory, by torch's CPU kernel (``_weight_int4pack_mm_for_cpu``).

The kernel multiplies bfloat16 inputs by ``(code - 8) * scale + offset`` with scale and offset in bfloat16, and sums in float32.
So the numbers are not the artifact's to float32 rounding, but to bfloat16's: see :class:`Int4Linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.linear import tensor_bytes
from quantize.grids import QuantizedTensor

GROUP_SIZES = (32, 64, 128)
_ROWS = 16  # the kernel takes outputs in multiples of this
_MIDDLE = 8


@dataclass(frozen=True)
class Int4Codes:
    """A matrix on a 4-bit grid: ``weight = scale * code + minimum`` of the weight's group.

    Attributes:
        codes: uint8 ``[out_features, in_features]``, 0 to 15; groups are consecutive columns.
        scales, minima: float32 ``[out_features, groups]``.
        order: int64 ``[in_features]``: column ``j`` belongs to input ``order[j]``; None where they are in order.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor
    order: Tensor | None = None

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """The weight, float32 ``[out_features, in_features]``, columns in the inputs' order."""
        size = self.group_size
        weight = self.codes.float() * self.scales.repeat_interleave(size, 1) + self.minima.repeat_interleave(size, 1)
        return weight if self.order is None else weight[:, self.order.argsort()]


def from_tensor(tensor: QuantizedTensor) -> Int4Codes | None:
    """A layer's codes in the kernel's terms, or None where it has none: other bits, ragged or other groups, odd sizes."""
    columns = tensor.codes.shape[1]
    size = tensor.grid.columns_per_group(columns)
    counts = torch.bincount(tensor.g_idx.long(), minlength=tensor.scales.shape[1])
    if tensor.grid.bits != 4 or bool((counts != size).any()):
        return None
    scales = tensor.scales.float()
    minima = -scales * tensor.zeros.float()
    if size not in GROUP_SIZES:  # a larger group is several small ones with the same scale
        fitting = next((small for small in reversed(GROUP_SIZES) if size % small == 0), 0)
        if not fitting:
            return None
        scales, minima = (part.repeat_interleave(size // fitting, 1) for part in (scales, minima))
    sorted_already = bool((tensor.g_idx.diff() >= 0).all())
    order = None if sorted_already else tensor.g_idx.argsort(stable=True)
    codes = tensor.codes if order is None else tensor.codes[:, order]
    return fitted(Int4Codes(codes, scales, minima, order))


def fitted(codes: Int4Codes) -> Int4Codes | None:
    """``codes`` if the kernel takes their shape, else None."""
    return codes if codes.group_size in GROUP_SIZES and codes.codes.shape[0] % _ROWS == 0 else None


def join_codes(parts: Sequence[Int4Codes]) -> Int4Codes | None:
    """Matrices that share their inputs as one, side by side; None where groups or orders differ."""
    first = parts[0]
    for part in parts[1:]:
        if part.group_size != first.group_size or (part.order is None) != (first.order is None):
            return None
        if part.order is not None and not torch.equal(part.order, first.order):  # type: ignore[arg-type]
            return None
    return Int4Codes(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.minima for part in parts]),
        first.order,
    )


class Int4Linear:
    """A layer of :class:`Int4Codes`.

    Inputs, scales and offsets are rounded to bfloat16, 2^-9 of each at most, and so is the output: an output differs from the
    dequantized layer's by at most 2^-7 of ``sum |x| (|scale (code - 8)| + |offset|)``.
    """

    def __init__(self, codes: Int4Codes, bias: Tensor | None = None) -> None:
        """``bias`` ``[out_features]`` in the compute type; see :func:`fitted` for the shapes."""
        self.out_features = codes.codes.shape[0]
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.codes.int().contiguous(), 1)
        offsets = codes.minima + _MIDDLE * codes.scales
        self._scales = torch.stack((codes.scales.t(), offsets.t()), -1).bfloat16().contiguous()  # [groups, out, 2]
        self._group_size, self._order, self._bias = codes.group_size, codes.order, bias

    def __call__(self, x: Tensor) -> Tensor:
        if self._order is not None:
            x = x[:, self._order]
        narrow = x.to(torch.bfloat16).contiguous()
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(narrow, self._packed, self._group_size, self._scales)
        out: Tensor = product.to(x.dtype)
        return out if self._bias is None else out.add_(self._bias)

    def nbytes(self) -> int:
        return tensor_bytes(self._packed, self._scales, self._order, self._bias)
