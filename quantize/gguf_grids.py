"""GGUF's grids: the values that weights may take in llama.cpp's block formats, for solvers to choose from.

A weight is ``scale * (code - zero)``. The formats differ in what is stored of scale and zero (ggml's ``ggml-common.h``):

===========  ====  =====  =======================================================================
type         bits  group  scale and zero
===========  ====  =====  =======================================================================
Q4_0, Q5_0   4, 5  32     a signed FP16 scale; the zero point is half the range
Q8_0         8     32     the same, positive; codes from 1
Q4_1, Q5_1   4, 5  32     an FP16 scale and an FP16 minimum, ``zero = -minimum / scale``
Q4_K, Q5_K   4, 5  32     6 bits each for scale and minimum; 8 groups share an FP16 step for either
Q6_K         6     16     8 signed bits for the scale; 16 groups share an FP16 step
===========  ====  =====  =======================================================================

Groups are consecutive columns, so scales are chosen before columns are rounded in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quantize.errors import InputError
from quantize.grids import Grid

_FP16 = torch.finfo(torch.float16)
_FP16_LEAST = _FP16.smallest_normal * _FP16.eps
_FITS = 2  # of scales to codes and codes to scales, for each range that is tried


class _Layout(NamedTuple):
    bits: int
    group_size: int
    minima: bool  # whether a minimum is stored
    levels: int  # largest code of a scale inside a super-block; 0: scales are FP16 themselves
    groups: int  # in a super-block
    least: int  # smallest code of a weight


_LAYOUTS = {
    "Q4_0": _Layout(4, 32, False, 0, 1, 0),
    "Q5_0": _Layout(5, 32, False, 0, 1, 0),
    "Q8_0": _Layout(8, 32, False, 0, 1, 1),
    "Q4_1": _Layout(4, 32, True, 0, 1, 0),
    "Q5_1": _Layout(5, 32, True, 0, 1, 0),
    "Q4_K": _Layout(4, 32, True, 63, 8, 0),
    "Q5_K": _Layout(5, 32, True, 63, 8, 0),
    "Q6_K": _Layout(6, 16, False, 127, 16, 0),
}
KINDS = tuple(_LAYOUTS)


@dataclass(frozen=True)
class GgufGrid(Grid):
    """One of llama.cpp's block formats as a grid. Made by :func:`gguf_grid`.

    Attributes:
        kind: llama.cpp's name of the type.
    """

    kind: str = "Q4_0"
    zero_dtype = torch.float32

    def __post_init__(self) -> None:
        if self.kind not in _LAYOUTS:
            raise InputError(f"grid {self.kind} is none of GGUF's that can be calibrated; use {', '.join(KINDS)}")

    @property
    def _layout(self) -> _Layout:
        return _LAYOUTS[self.kind]

    @property
    def real_zeros(self) -> bool:
        """Whether zero points are real numbers, made from a stored minimum."""
        return self._layout.minima

    def check_divides(self, name: str, in_features: int) -> None:
        """Raise :class:`InputError` unless blocks fill a row of ``in_features`` weights."""
        block = self.group_size * self._layout.groups
        if in_features % block:
            raise InputError(f"in_features={in_features} of {name} is no multiple of {block}, the block of {self.kind}")

    def find_params(
        self, groups: Tensor, weight: Tensor | None = None, search_steps: int = 0, search_range: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Choose scale and zero for each row of ``groups``: see :meth:`Grid.find_params`.

        Several ranges give codes; each range's scale (and minimum) is then fitted to its codes by least squares, and the fit
        with the least weighted squared error is taken.
        """
        importance = torch.ones_like(groups[..., :1, :]) if weight is None else weight
        best: tuple[Tensor, Tensor] | None = None
        least = torch.empty(0)
        for low, high in self._ranges(groups, search_steps, search_range):
            trial = self.params_from_range(low, high)
            for _ in range(_FITS if search_steps else 0):
                trial = self._fitted(groups, importance, *trial)
            error = self._weighted_error(groups, *trial, weight)
            if best is None:
                best, least = trial, error
                continue
            better = error < least
            least = torch.where(better, error, least)
            best = (torch.where(better, trial[0], best[0]), torch.where(better, trial[1], best[1]))
        assert best is not None
        return best

    def _ranges(self, groups: Tensor, steps: int, reach: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Ranges ``(low, high)`` to try; of a symmetric type, the end named by the larger magnitude gets the extra code."""
        low, high = groups.amin(-1), groups.amax(-1)
        if self.real_zeros:
            if self._layout.levels:
                low = low.clamp(max=0)  # a super-block's minima are not above zero
            yield low, high
            # Either end stays where it is: then the codes' phase moves as well, which is worth more than the width alone.
            width, most = high - low, self.maxq / (self.maxq - 1)
            for step in range(steps // 2):
                factor = most - (most - 1 + reach / 2) * step / (steps // 2)
                yield low, low + width * factor
                yield high - width * factor, high
            return
        # As llama.cpp has it, the weight of the largest magnitude gets the code that has no counterpart.
        extreme = torch.where(-low >= high, low, high)
        signs = (1, -1) if steps and self.kind != "Q8_0" else (1,)
        half = (self.maxq + 1) / 2
        most = half / (half - 1)  # the whole range without that code
        for step in range(steps + 1):
            factor = 1.0 if not steps else most - (most - 1 + reach) * step / steps
            for sign in signs:
                yield extreme * (sign * factor), torch.zeros_like(extreme)

    def params_from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero for values from ``low`` to ``high``; of a symmetric type, ``low`` is the lowest code's value."""
        if self.real_zeros:
            scale = ((high - low) / self.maxq).clamp(min=_FP16_LEAST)
            return self._stored(scale, -low / scale)
        half = (self.maxq + 1) // 2
        scale = low.abs() / (half - 1) if self.kind == "Q8_0" else -low / half
        return self._stored(scale, torch.full_like(scale, half))

    def _fitted(self, groups: Tensor, weight: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero by weighted least squares for the codes that they give."""
        codes = self.encode(groups, scale[..., None], zero[..., None])
        if not self.real_zeros:
            steps = codes - zero[..., None]
            norm = (steps.square() * weight).sum(-1)
            fitted = (steps * groups * weight).sum(-1) / norm.clamp(min=1e-30)
            return self._stored(torch.where(self.allows(fitted), fitted, scale), zero)
        total = (weight * torch.ones_like(codes)).sum(-1)
        mean_code = (codes * weight).sum(-1) / total
        mean = (groups * weight).sum(-1) / total
        spread = codes - mean_code[..., None]
        fitted = (spread * groups * weight).sum(-1) / (spread.square() * weight).sum(-1).clamp(min=1e-30)
        fitted = torch.where(self.allows(fitted), fitted, scale)
        low = mean - fitted * mean_code
        if self._layout.levels:
            low = low.clamp(max=0)
        return self._stored(fitted, -low / fitted)

    def _stored(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """FP16 scales and minima; those of super-blocks are settled only when all of their groups are known."""
        if self._layout.levels:
            return scale, zero
        stored = self.round_scale(scale)
        if not self.real_zeros:
            return stored, zero
        return stored, -(-scale * zero).half().float() / stored

    def allows(self, scale: Tensor) -> Tensor:
        """Where a scale is one that the grid can have, before it is rounded."""
        usable = (scale.abs() <= _FP16.max) & (scale.abs() >= _FP16_LEAST)
        return usable & (scale > 0) if self.real_zeros or self.kind == "Q8_0" else usable

    def round_scale(self, scale: Tensor) -> Tensor:
        """Round to FP16 and back, the sign kept; zero becomes the smallest number there is."""
        if not bool((scale.abs() <= _FP16.max).all()):
            raise InputError("a weight group's scale is NaN or beyond FP16; the checkpoint's weights are out of range")
        stored = scale.half().float()
        return torch.where(stored == 0, torch.full_like(stored, _FP16_LEAST), stored)

    def settle(self, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored of scales and zeros, ``[rows, groups]`` each: FP16 numbers, or codes of a super-block's step."""
        levels, together = self._layout.levels, self._layout.groups
        if not levels:
            return self._stored(scales, zeros)
        minima = scales * zeros
        step = shared_step(scales, levels, together)
        # A scale of no steps would lose its minimum.
        codes = torch.round(scales / step)
        codes = torch.where(codes == 0, torch.ones_like(codes), codes).clamp(-levels, levels)
        settled = codes * step
        if not self.real_zeros:
            return settled, zeros
        step = shared_step(minima, levels, together)
        minima = torch.round(minima / step).clamp(0, levels) * step
        return settled, minima / settled

    def encode(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes of ``values``; see :meth:`Grid.encode`."""
        codes = torch.round(values / scale + zero) if self.real_zeros else torch.round(values / scale) + zero
        return torch.clamp(codes, self._layout.least, self.maxq)


def shared_step(values: Tensor, levels: int, together: int) -> Tensor:
    """The FP16 step of each super-block that lets its largest value have code ``levels``: float32, as wide as ``values``.

    Args:
        values: ``[rows, groups]``.
        levels: the largest code.
        together: groups in a super-block.
    """
    rows, groups = values.shape
    largest = values.abs().view(rows, groups // together, together).amax(-1)
    step = (largest / levels).half().float().clamp(min=_FP16_LEAST)
    return step.repeat_interleave(together, 1)


def gguf_grid(kind: str) -> GgufGrid:
    """The grid of one of llama.cpp's types, by its name.

    Raises:
        InputError: there is no such type, or none that a solver can choose values for.
    """
    if kind not in _LAYOUTS:
        raise InputError(f"grid {kind} is none of GGUF's that can be calibrated; use {', '.join(KINDS)}")
    layout = _LAYOUTS[kind]
    scale_dtype = torch.float32 if layout.levels else torch.float16
    return GgufGrid(layout.bits, layout.group_size, not layout.minima, 0, scale_dtype, kind)
