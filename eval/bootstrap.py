"""Is a difference between two models on the same items more than noise? Paired bootstrap and sign flips, in plain numpy.

Two models that answered the same items are compared item by item: what they have in common (items that both find easy, or hard)
cancels, so a difference shows that two separate standard errors would hide.

Items are drawn with replacement, as many as there are, ``resamples`` times. With ``m`` the mean difference and ``m*`` that of a
resample, ``p`` is the share of resamples with ``|m* - m| >= |m|`` (the bootstrap distribution moved to where there is no
difference; Efron and Tibshirani, "An Introduction to the Bootstrap", section 16.4). The interval is symmetric around ``m``,
``m +- q`` with ``q`` the 95 % quantile of ``|m* - m|`` (Hall 1988, "On symmetric bootstrap confidence intervals"): it holds 0
where the difference is noise. Interval and ``p`` are one test, and with few changed answers it is less rash than the percentile
interval.

It still is rash where very few items changed: five answers lost and none won give 0.037. Were there no difference, each change
might as well have had the other sign (Fisher, "The Design of Experiments", section 21), which for right and wrong answers is
the exact McNemar test: 2/32 for those five. Below ``FEW`` changed items both tests must find a difference: the larger ``p`` and
the wider interval are taken, that of the flips being ``m +- q`` with ``q`` the 95 % quantile of flipped changes' mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
LEVEL = 0.95
FEW = 25  # changed items, below which signs are flipped as well: where McNemar's approximate test gives way to the exact one
_NUMBERS_AT_ONCE = 2**22  # counts of a chunk of resamples, 32 MB
_ROUNDING = 1e-12  # sums of the same items in another order may differ by so much


@dataclass(frozen=True)
class Difference:
    """A variant's mean score minus a reference's, on the same items.

    Attributes:
        difference: mean of variant - reference, in the scores' unit (accuracy: -0.02 is 2 points lost).
        stderr: its standard error over resamples.
        low: lower end of the 95 % interval.
        high: upper end.
        p_value: probability of a difference as large by chance, were there none; never 0, because resamples are finite. With
            fewer than ``FEW`` changed items the larger one of two tests.
        within_noise: ``p_value`` is 0.05 or more.
        lost: items on which the variant scores less: with right or wrong answers, right that became wrong.
        won: items on which it scores more.
        samples: items.
    """

    difference: float
    stderr: float
    low: float
    high: float
    p_value: float
    within_noise: bool
    lost: int
    won: int
    samples: int


def paired_difference(
    variant: NDArray[np.float64], reference: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Compare two models' scores on the same items.

    Args:
        variant: ``[items]``, finite; of right and wrong answers, 1 and 0.
        reference: ``[items]``, in the same order.
        resamples: how often the items are drawn.
        seed: of the drawing; the same scores and seed give the same numbers.

    Raises:
        ValueError: shapes differ, there are no items, or a score is not finite.
    """
    if variant.ndim != 1 or variant.shape != reference.shape or not len(variant):
        raise ValueError(f"scores of the same items, [items] and [items], are compared; got {variant.shape}, {reference.shape}")
    changes = np.asarray(variant, np.float64) - np.asarray(reference, np.float64)
    if not np.isfinite(changes).all():
        raise ValueError("scores must be finite")
    mean = float(changes.mean())
    generator = np.random.default_rng(seed)
    means = _resampled_means(changes, resamples, generator)
    distances = np.abs(means - mean)
    p_value = (1 + int(np.count_nonzero(distances >= abs(mean) - _ROUNDING))) / (resamples + 1)
    reach = float(np.quantile(distances, LEVEL, method="inverted_cdf"))
    if 0 < np.count_nonzero(changes) < FEW:
        flipped, flips_reach = _sign_flips(changes, resamples, generator)
        p_value, reach = max(p_value, flipped), max(reach, flips_reach)
    return Difference(
        difference=mean,
        stderr=float(means.std()),
        low=mean - reach,
        high=mean + reach,
        p_value=p_value,
        within_noise=p_value >= 1 - LEVEL,
        lost=int(np.count_nonzero(changes < 0)),
        won=int(np.count_nonzero(changes > 0)),
        samples=len(changes),
    )


def _resampled_means(values: NDArray[np.float64], resamples: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Means of ``resamples`` drawings with replacement, ``[resamples]``.

    How often each distinct value is drawn is multinomial, and right or wrong answers differ by one of three values: so the cost
    hardly depends on the number of items.
    """
    distinct, counts = np.unique(values, return_counts=True)
    chunk = max(1, _NUMBERS_AT_ONCE // len(distinct))
    parts = []
    for start in range(0, resamples, chunk):
        drawn = generator.multinomial(len(values), counts / len(values), size=min(chunk, resamples - start))
        parts.append(drawn @ distinct / len(values))
    return np.concatenate(parts)


def _sign_flips(changes: NDArray[np.float64], resamples: int, generator: np.random.Generator) -> tuple[float, float]:
    """``p`` and reach of the interval where the sign of each change is a coin's.

    Changes of one size, as between right and wrong answers, need no drawing: the number of positive ones is binomial.
    """
    sizes, counts = np.unique(np.abs(changes[changes != 0]), return_counts=True)
    mean, few = abs(float(changes.mean())), int(counts.sum())
    if len(sizes) == 1:
        positive: NDArray[np.int64] = np.arange(few + 1, dtype=np.int64)[:, None]
        weights = np.array([math.comb(few, number) for number in range(few + 1)], np.float64) / 2.0**few
        unseen = 0.0
    else:
        positive = generator.binomial(counts, 0.5, size=(resamples, len(sizes)))
        weights = np.full(resamples, 1 / (resamples + 1))
        unseen = 1 / (resamples + 1)  # what was found counts as one of the drawings
    distances = np.abs((2 * positive - counts) @ sizes) / len(changes)
    order = np.argsort(distances)
    at = int(np.searchsorted(np.cumsum(weights[order]), LEVEL))
    reach = float(distances[order[min(at, len(order) - 1)]])
    extreme = float(weights[distances >= mean - _ROUNDING].sum())
    return min(1.0, extreme + unseen), reach
