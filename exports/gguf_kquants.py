"""The k-quants Q4_K, Q5_K and Q6_K as llama.cpp writes them without an importance matrix.

A block of 256 weights has groups of 32 (Q4_K, Q5_K) or 16 (Q6_K). Each group's scale, and minimum, is searched for:
``make_qkx2_quants`` and ``make_qx_quants`` of llama.cpp's ``ggml/src/ggml-quants.c`` try a row of step sizes, round, fit scale
and minimum to the codes by weighted least squares and keep the fit of least error. Then the groups' scales are rounded to
integers times a float16, and the weights are rounded again to what is stored.

All groups are searched at once. Groups are columns here, so that a sum over a group's weights adds them one after the other,
in float32, as the scalar code does: the same bytes need the same order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from exports.gguf_layout import Fields, Floats, GgufType
from exports.gguf_rounding import signed_peak, stored

# Adding 1.5 * 2**23 leaves a float32's fraction no bits: what remains in the mantissa is the nearest integer, ties to even.
_MAGIC = np.float32(12582912)
# Up to here the trick is exact.
_EXACT = np.float32(4e6)
# Below it a group counts as zero (GROUP_MAX_EPS).
_NOTHING = np.float32(1e-15)

# First offset of the row of step sizes and how many follow, 0.1 apart.
_STEPS = {"Q4_K": (-1.0, 20), "Q5_K": (-0.5, 15)}

_Mask = npt.NDArray[np.bool_]


def search_blocks(values: Floats, kind: GgufType) -> Fields:
    """Codes, super scales and factors of blocks.

    Args:
        values: float32 ``[group_size, n * groups]``, a group in each column, those of a block beside each other.
        kind: Q4_K, Q5_K or Q6_K.

    Returns:
        Codes, float16 supers and integer factors of ``n`` blocks.

    Raises:
        ValueError: a value is infinite or not a number, or a scale does not fit in float16.
    """
    # Groups of one value and the like divide by zero; ggml's results for them come out of the same bit arithmetic.
    with np.errstate(all="ignore"):
        return _search_symmetric(values) if kind.supers == 1 else _search_affine(values, kind)


def _nearest(values: Floats) -> npt.NDArray[np.int32]:
    """ggml's ``nearest_int``, with its results for numbers that are too large, infinite or not numbers."""
    return ((values + _MAGIC).view(np.int32) & 0x007FFFFF) - 0x00400000


def _rounded(scaled: Floats, bottom: int, top: int, exact: bool) -> Floats:
    """``scaled`` rounded and clipped, as float32; ``scaled`` is overwritten. Not ``exact``: by way of the bits, like ggml."""
    if not exact:
        return np.clip(_nearest(scaled), bottom, top).astype(np.float32)
    scaled += _MAGIC
    scaled -= _MAGIC
    np.maximum(scaled, np.float32(bottom), out=scaled)
    return np.minimum(scaled, np.float32(top), out=scaled)


def _sum(values: Floats) -> Floats:
    """Sums over the rows, one row after the other."""
    total: Floats = np.add.reduce(values, axis=0)
    return total


class _Affine:
    """The search for scale and minimum of each column of ``x`` (float32 ``[32, groups]``), ``make_qkx2_quants``."""

    def __init__(self, x: Floats, kind: GgufType) -> None:
        self.x, self.top = x, 2**kind.bits - 1
        self._floor, self._high = x.min(axis=0), x.max(axis=0)
        self._weights = np.sqrt(_sum(x * x) / np.float32(32)) + np.abs(x)
        self._sum_w, self._sum_x = _sum(self._weights), _sum(self._weights * x)
        self.low: Floats = np.minimum(self._floor, np.float32(0))
        self._flat = self._high == self.low
        step: Floats = np.float32(self.top) / (self._high - self.low)
        step[self._flat] = 0
        self.scale: Floats = np.where(self._flat, np.float32(0), np.float32(1) / step)
        # By which step and minimum the best codes were found: cheaper to keep than the codes.
        self.best_step, self.best_low = step, self.low
        self._error = self._squared_error(self._codes(step), self.scale, self.low)
        first, steps = _STEPS[kind.name]
        for i in range(steps + 1):
            self._try(np.float32(first) + np.float32(0.1) * np.float32(i) + np.float32(self.top))

    def _codes(self, step: Floats) -> Floats:
        reach = np.maximum(self._high - self.low, self.low - self._floor) * np.abs(step)
        scaled = self.x - self.low
        scaled *= step
        return _rounded(scaled, 0, self.top, bool((reach < _EXACT).all()))

    def _squared_error(self, codes: Floats, scale: Floats, low: Floats) -> Floats:
        """Weighted squared error of each group; ``codes`` is overwritten."""
        codes *= scale
        codes += low
        codes -= self.x
        codes *= codes
        codes *= self._weights
        return _sum(codes)

    def _try(self, reach: np.float32) -> None:
        """Codes with ``reach`` steps from minimum to maximum, a least squares fit to them, and a trial."""
        step = reach / (self._high - self.low)
        step[self._flat] = 0
        codes = self._codes(step)
        product = self._weights * codes
        sum_l = _sum(product)
        sum_l2 = _sum(product * codes)
        product *= self.x
        sum_xl = _sum(product)
        determinant: Floats = self._sum_w * sum_l2 - sum_l * sum_l
        scale: Floats = np.divide(self._sum_w * sum_xl - self._sum_x * sum_l, determinant)
        low: Floats = np.divide(sum_l2 * self._sum_x - sum_l * sum_xl, determinant)
        positive = low > 0
        low[positive] = 0
        scale[positive] = (sum_xl / sum_l2)[positive]
        error = self._squared_error(codes, scale, low)
        better = (determinant > 0) & (error < self._error)
        self.best_step = np.where(better, step, self.best_step)
        self.best_low = np.where(better, self.low, self.best_low)
        self._error = np.where(better, error, self._error)
        self.scale = np.where(better, scale, self.scale)
        self.low = np.where(better, low, self.low)


def _search_affine(x: Floats, kind: GgufType) -> Fields:
    found = _Affine(x, kind)
    numbers = np.stack((found.scale, -found.low)).reshape(2, -1, 8)
    largest = np.maximum(numbers.max(axis=2), np.float32(0))
    supers = stored(*(largest / np.float32(63)))
    inverse = np.where(largest > 0, np.float32(63) / largest, np.float32(0))
    # Bytes in ggml: a negative scale, which only rounding errors make, wraps around.
    factors = np.minimum(_nearest(inverse[:, :, None] * numbers) & 0xFF, 63).astype(np.int16)
    scale, minimum = (supers.astype(np.float32)[:, :, None] * factors.astype(np.float32)).reshape(2, -1)
    codes = np.clip(_nearest((x + minimum) / scale), 0, found.top)
    zero = np.flatnonzero(scale == 0)
    if zero.size:  # the scale was rounded away: ggml leaves the codes of the search
        scaled = (x[:, zero] - found.best_low[zero]) * found.best_step[zero]
        codes[:, zero] = np.clip(_nearest(scaled), 0, found.top)
    return Fields(_blocks(codes, 8), supers, factors.transpose(0, 2, 1))


def _blocks(codes: npt.NDArray[np.int32], groups: int) -> npt.NDArray[np.uint8]:
    """Codes of groups, one in each column, to those of blocks, one in each column."""
    apart = codes.astype(np.uint8).reshape(len(codes), -1, groups)
    return np.ascontiguousarray(apart.transpose(2, 0, 1)).reshape(256, -1)


def _search_symmetric(x: Floats) -> Fields:
    scales, best_step = _fit_symmetric(x)
    per_block = scales.reshape(-1, 16).T
    peak = signed_peak(per_block, per_block.min(axis=0), per_block.max(axis=0))
    empty = np.abs(peak) < _NOTHING
    step = np.float32(-128) / peak
    inverse = np.float32(1) / step
    inverse[empty] = 0
    supers = stored(inverse)
    factors = np.minimum(_nearest(step * per_block), 127).astype(np.int8).astype(np.int16)
    factors[:, empty] = 0
    scale = (supers.astype(np.float32) * factors.astype(np.float32)).T.reshape(-1)
    codes = np.clip(_nearest(x / scale), -32, 31) + 32
    zero = np.flatnonzero(scale == 0)
    if zero.size:
        codes[:, zero] = np.clip(_nearest(x[:, zero] * best_step[zero]), -32, 31) + 32
        codes[:, np.abs(x).max(axis=0) < _NOTHING] = 0
    codes[:, np.repeat(empty, 16)] = 0
    return Fields(_blocks(codes, 16), supers, factors[None])


def _fit_symmetric(x: Floats) -> tuple[Floats, Floats]:
    """Scales of the columns of ``x`` (float32 ``[16, groups]``) and the step sizes they came by, ``make_qx_quants``."""
    peak = signed_peak(x, x.min(axis=0), x.max(axis=0))
    if not np.isfinite(peak).all():
        raise ValueError("values are not finite")
    nothing: _Mask = np.abs(peak) < _NOTHING
    peak[nothing] = 1
    squares = x * x
    cubes = squares * x

    def fit(step: Floats) -> tuple[Floats, Floats]:
        codes = _rounded(x * step, -32, 31, True)
        sum_lx = _sum(cubes * codes)
        sums = squares * codes
        sums *= codes
        return sum_lx, _sum(sums)

    best_step = np.float32(-32) / peak
    sum_lx, sum_l2 = fit(best_step)
    scale = np.where(sum_l2 != 0, sum_lx / sum_l2, np.float32(0))
    best = scale * sum_lx
    for i in range(-9, 10):
        if i == 0:
            continue
        step = -(np.float32(32) + np.float32(0.1) * np.float32(i)) / peak
        sum_lx, sum_l2 = fit(step)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scale = np.where(better, sum_lx / sum_l2, scale)
        best = np.where(better, scale * sum_lx, best)
        best_step = np.where(better, step, best_step)
    scale[nothing] = 0
    return scale, best_step
