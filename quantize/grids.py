"""Grids: which values a quantized weight may take, and the quantized tensor itself.

The integer grid of ``bits`` bits maps a weight ``w`` to a code and back (Jacob et al. 2018, arXiv:1712.05877, eq. 1)::

    code = clamp(round(w / scale) + zero_point, 0, 2**bits - 1)        w_hat = scale * (code - zero_point)

One ``(scale, zero_point)`` pair serves ``group_size`` consecutive input columns of one output row; ``group_size=-1``
means the whole row ("per channel"). Scales are rounded to the container's 16-bit type *before* any weight is rounded, so
the numbers a solver sees are the numbers a consumer will compute with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantize.errors import InputError

SUPPORTED_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Grid:
    """An integer grid.

    Attributes:
        bits: code width, one of 2, 3, 4, 8.
        group_size: input columns that share a scale; -1 for all columns of the row.
        symmetric: the zero point is fixed at ``2**(bits-1)`` (no information stored); otherwise it is an integer per group.
        zero_min: smallest zero point allowed. 1 by default: the GPTQ v1 checkpoint stores ``zero_point - 1`` and a zero
            point of 0 would borrow from the neighbouring field (AutoGPTQ and vLLM read it as 2**bits).
        scale_dtype: the type scales are stored in.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = True
    zero_min: int = 1
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise InputError(f"solver.bits={self.bits} is not supported; use one of {', '.join(map(str, SUPPORTED_BITS))}")
        if self.group_size != -1 and self.group_size < 1:
            raise InputError(f"solver.group_size={self.group_size} is not a group; use -1 (whole row), 32, 64 or 128")

    zero_dtype: ClassVar[torch.dtype] = torch.uint8

    @property
    def maxq(self) -> int:
        """The largest code, ``2**bits - 1``."""
        return int(2**self.bits - 1)

    def columns_per_group(self, in_features: int) -> int:
        """Columns that share a scale in a row of ``in_features`` weights."""
        return in_features if self.group_size == -1 else self.group_size

    def num_groups(self, in_features: int) -> int:
        """Groups in a row of ``in_features`` weights; a ragged last group counts as one."""
        return math.ceil(in_features / self.columns_per_group(in_features))

    def check_divides(self, name: str, in_features: int) -> None:
        """Raise :class:`InputError` unless the group size divides ``in_features`` (what GPTQ checkpoints require)."""
        size = self.columns_per_group(in_features)
        if in_features % size:
            fits = [str(g) for g in (128, 64, 32, 16) if in_features % g == 0]
            raise InputError(
                f"group_size={self.group_size} does not divide in_features={in_features} of {name}; "
                f"use {', '.join(fits)}{' or ' if fits else ''}-1"
            )

    def find_params(
        self, groups: Tensor, weight: Tensor | None = None, search_steps: int = 0, search_range: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Choose scale and zero point for each row of ``groups``.

        Without a search these are the min-max parameters. With ``search_steps`` > 0 the range is shrunk by factors from 1
        down to ``1 - search_range`` and the factor with the least weighted squared error wins; 1 is among the candidates,
        so the search never increases that error.

        Args:
            groups: float32 ``[..., columns]``; one grid group in each row.
            weight: float32, broadcastable to ``groups``: importance of each column's squared error (GPTQ passes the
                Hessian's diagonal); None weighs all alike.
            search_steps: candidates besides 1.
            search_range: the largest shrinkage tried, in [0, 1).

        Returns:
            ``scale`` and ``zero``, float32 ``[...]``; ``scale`` is positive and representable in ``scale_dtype``.

        Raises:
            InputError: a weight is NaN, or too large for the scale type (scale above its largest finite value).
        """
        low = groups.amin(-1).clamp(max=0)
        high = groups.amax(-1).clamp(min=0)
        best = self.params_from_range(low, high)
        if not search_steps:
            return best
        least = self._weighted_error(groups, *best, weight)
        for step in range(1, search_steps + 1):
            shrink = 1 - search_range * step / search_steps
            trial = self.params_from_range(low * shrink, high * shrink)
            error = self._weighted_error(groups, *trial, weight)
            better = error < least
            least = torch.where(better, error, least)
            best = (torch.where(better, trial[0], best[0]), torch.where(better, trial[1], best[1]))
        return best

    def params_from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for values from ``low`` (at most 0) to ``high`` (at least 0), float32 of the same shape."""
        if self.symmetric:
            reach = torch.maximum(-low, high)
            scale = self.round_scale(2 * reach / self.maxq)
            return scale, torch.full_like(scale, (self.maxq + 1) // 2)
        # A zero point of at least zero_min costs codes below it, so a group without negative weights uses fewer steps.
        steps = torch.full_like(high, self.maxq)
        if self.zero_min:
            positive_only = low > -high * self.zero_min / (self.maxq - self.zero_min)
            steps = torch.where(positive_only, torch.full_like(high, self.maxq - self.zero_min), steps)
            low = torch.where(positive_only, torch.zeros_like(low), low)
        scale = self.round_scale((high - low) / steps)
        return scale, torch.clamp(torch.round(-low / scale), self.zero_min, self.maxq)

    def round_scale(self, scale: Tensor) -> Tensor:
        """Round to ``scale_dtype`` and back to float32; zero (an all-zero group) becomes the smallest subnormal."""
        info = torch.finfo(self.scale_dtype)
        if not bool((scale <= info.max).all()):  # NaN is not either
            if bool(torch.isnan(scale).any()):
                raise InputError("a weight is NaN; the checkpoint is damaged")
            raise InputError(
                f"a weight group needs scale {float(scale.max()):.3g}, beyond {self.scale_dtype}'s {info.max:.3g}; "
                "the checkpoint's weights are out of range"
            )
        return scale.to(self.scale_dtype).float().clamp(min=info.smallest_normal * info.eps)

    def allows(self, scale: Tensor) -> Tensor:
        """Where a scale is one that the grid can have, before it is rounded."""
        return torch.isfinite(scale) & (scale > 0) & (scale <= torch.finfo(self.scale_dtype).max)

    def settle(self, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored of a layer's scales and zero points, float32 ``[rows, groups]`` each."""
        return self.round_scale(scales), zeros

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes of ``values``, float32 of whole numbers in ``[0, maxq]``; shapes broadcast. Ties go to the even integer."""
        return torch.clamp(torch.round(values / scale) + zero, 0, self.maxq)

    def round_trip(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The grid value nearest to each of ``values`` (encode, then decode), float32."""
        return (self.encode(values, scale, zero) - zero) * scale

    def _weighted_error(self, groups: Tensor, scale: Tensor, zero: Tensor, weight: Tensor | None) -> Tensor:
        error = (self.round_trip(groups, scale[..., None], zero[..., None]) - groups).square_()
        return (error if weight is None else error.mul_(weight)).sum(-1)


@dataclass
class QuantizedTensor:
    """One quantized linear layer's weight, independent of how any container packs it.

    Attributes:
        codes: uint8 ``[out_features, in_features]``, in the layer's own column order.
        scales: ``[out_features, groups]`` in the grid's ``scale_dtype``.
        zeros: uint8 ``[out_features, groups]``, integer zero points.
        g_idx: int32 ``[in_features]``, the group of each input column (not monotonic under ``desc_act``).
        grid: the grid the codes live on.
        input_scale: ``[1]`` in ``scale_dtype``, the step of quantized inputs whose range is fixed beforehand; else None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    grid: Grid
    input_scale: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight these codes stand for, ``[out_features, in_features]``; computed in float32, then cast."""
        columns = self.g_idx.long()
        scales = self.scales.float()[:, columns]
        return ((self.codes.float() - self.zeros.float()[:, columns]) * scales).to(dtype)

    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points as a packed container would hold them (``g_idx`` not counted)."""
        bits = self.codes.numel() * self.grid.bits + self.zeros.numel() * self.grid.bits
        return math.ceil(bits / 8) + self.scales.numel() * self.scales.element_size()


def group_index(in_features: int, group_size: int) -> Tensor:
    """``g_idx`` of consecutive groups: int32 ``[in_features]``."""
    size = in_features if group_size == -1 else group_size
    return (torch.arange(in_features) // size).to(torch.int32)


def grouped(values: Tensor, grid: Grid) -> Tensor:
    """``[..., columns]`` to ``[..., groups, columns of a group]``; a ragged last group is filled up with zeros."""
    columns = values.shape[-1]
    size, groups = grid.columns_per_group(columns), grid.num_groups(columns)
    if groups * size != columns:
        values = torch.nn.functional.pad(values, (0, groups * size - columns))
    return values.reshape(*values.shape[:-1], groups, size)


def quantize_nearest(weight: Tensor, grid: Grid, search_steps: int = 0, search_range: float = 0.0) -> QuantizedTensor:
    """Round-to-nearest on ``grid``: every weight goes to the closest value of its group's grid.

    Args:
        weight: floating ``[out_features, in_features]``, finite.
        grid: the grid; a ragged last group is allowed here (a container may still refuse it).
        search_steps: see :meth:`Grid.find_params`.
        search_range: see :meth:`Grid.find_params`.
    """
    columns = weight.shape[1]
    groups = grouped(weight.float(), grid)
    scale, zero = grid.find_params(groups, None, search_steps, search_range)
    codes = grid.encode(groups, scale[..., None], zero[..., None]).flatten(1)[:, :columns]
    return QuantizedTensor(
        codes=codes.to(torch.uint8).contiguous(),
        scales=scale.to(grid.scale_dtype),
        zeros=zero.to(torch.uint8),
        g_idx=group_index(columns, grid.group_size),
        grid=grid,
    )
