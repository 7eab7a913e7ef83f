"""Choosing one option for each item so that the total cost is least within a budget of sizes: a multiple-choice knapsack.

Solved by dynamic programming over sizes (Kellerer, Pferschy & Pisinger, Knapsack Problems, 2004, section 11.5). Sizes count in
units of the greatest common divisor of all differences, and then the answer is exact: for the like layers of a decoder that
unit is large. Where it is so small that the table would pass ``_MOST_CELLS``, sizes are rounded up to a coarser unit: the
budget still holds, and the choice is the best for the rounded sizes. The unit does not depend on the budget, so a larger budget
never gives a higher cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MOST_CELLS = 2**25
_MOST_BINS = 2**15


@dataclass(frozen=True)
class Option:
    """A choice for an item: its ``size`` in whole bytes and its ``cost``, any finite number."""

    size: int
    cost: float


class Knapsack:
    """All budgets solved at once.

    Attributes:
        smallest: the total size of every item's smallest option: no budget below it can be met.
        largest: the size beyond which a larger budget changes nothing.
        exact: whether sizes needed no rounding.
    """

    def __init__(self, items: Sequence[Sequence[Option]]) -> None:
        """Fill the table, ``O(items * bins * options)``.

        Raises:
            ValueError: an item without options.
        """
        if not all(items):
            raise ValueError("every item needs at least one option")
        self._items = items
        least = [min(option.size for option in options) for options in items]
        extras = [[option.size - low for option in options] for options, low in zip(items, least, strict=True)]
        self.smallest = sum(least)
        total = sum(map(max, extras))
        self.largest = self.smallest + total
        common = math.gcd(*(extra for row in extras for extra in row)) or 1
        bins = max(1, min(_MOST_BINS, _MOST_CELLS // max(1, len(items))))
        self._unit = common * max(1, math.ceil(total / common / bins))
        self.exact = self._unit == common
        self._extras = [[math.ceil(extra / self._unit) for extra in row] for row in extras]
        self._width = sum(map(max, self._extras)) + 1
        self._best, self._taken = self._fill()

    def _fill(self) -> tuple[NDArray[np.float64], list[NDArray[np.uint8]]]:
        """Least cost for each number of units, and which option of each item gives it."""
        best: NDArray[np.float64] = np.zeros(self._width)
        taken: list[NDArray[np.uint8]] = []
        for options, extras in zip(self._items, self._extras, strict=True):
            following: NDArray[np.float64] = np.full(self._width, np.inf)
            chosen: NDArray[np.uint8] = np.zeros(self._width, np.uint8)
            # Smaller options first: of equally good ones the smallest is taken.
            for number in sorted(range(len(options)), key=lambda index: extras[index]):
                trial = np.full(self._width, np.inf)
                trial[extras[number] :] = best[: self._width - extras[number]] + options[number].cost
                better = trial < following
                following[better], chosen[better] = trial[better], number
            best = following
            taken.append(chosen)
        return best, taken

    def choose(self, budget: int) -> list[int]:
        """The option taken for each item within ``budget`` bytes.

        Raises:
            ValueError: the budget is below :attr:`smallest`.
        """
        if budget < self.smallest:
            raise ValueError(f"a budget of {budget} bytes is below the {self.smallest} that the smallest options take")
        left = min((budget - self.smallest) // self._unit, self._width - 1)
        chosen = []
        for extras, taken in zip(reversed(self._extras), reversed(self._taken), strict=True):
            chosen.append(int(taken[left]))
            left -= extras[chosen[-1]]
        return chosen[::-1]

    def line(self, points: int = 200) -> list[tuple[int, float]]:
        """The Pareto line: ``(size, cost)`` of the best choices from the smallest to the largest budget, cost falling.

        At most ``points`` of them, spread evenly over the budgets.
        """
        line: list[tuple[int, float]] = []
        for left in np.unique(np.linspace(0, self._width - 1, min(points, self._width)).astype(int)):
            size, cost = self.total(self.choose(self.smallest + int(left) * self._unit))
            if not line or cost < line[-1][1]:
                line.append((size, cost))
        return line

    def total(self, chosen: Sequence[int]) -> tuple[int, float]:
        """Size and cost of a choice."""
        picked = [options[number] for options, number in zip(self._items, chosen, strict=True)]
        return sum(option.size for option in picked), math.fsum(option.cost for option in picked)
