"""The paired bootstrap: what must hold for any scores, and how often it cries wolf."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from eval.bootstrap import FEW, _resampled_means, paired_difference

ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200)
SCORES = st.lists(
    st.tuples(st.floats(-100, 100, allow_subnormal=False), st.floats(-100, 100, allow_subnormal=False)), min_size=1, max_size=60
)


def columns(pairs: Sequence[tuple[float, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    table = np.array(pairs, np.float64)
    return table[:, 0], table[:, 1]


@given(ANSWERS)
def test_counts_and_means_are_those_of_the_answers(pairs: list[tuple[bool, bool]]) -> None:
    found = paired_difference(*columns(pairs), resamples=200)
    assert found.difference == pytest.approx(sum(v - r for v, r in pairs) / len(pairs), abs=1e-12)
    assert found.lost == sum(r and not v for v, r in pairs)
    assert found.won == sum(v and not r for v, r in pairs)
    assert found.samples == len(pairs)


@given(SCORES)
def test_interval_and_p_value_are_one_test(pairs: list[tuple[float, float]]) -> None:
    found = paired_difference(*columns(pairs), resamples=400)
    assert found.low <= found.difference <= found.high
    assert 0 < found.p_value <= 1
    assert found.within_noise == (found.p_value >= 0.05)
    tolerance = 1e-9 * max(1, abs(found.difference))
    # At the very border the share of resamples and their quantile may fall on either side.
    if abs(found.p_value - 0.05) > 2 / 400:
        assert found.within_noise == (found.low <= tolerance and found.high >= -tolerance)


@given(ANSWERS)
def test_the_reverse_comparison_is_the_mirror_image_in_what_is_not_drawn(pairs: list[tuple[bool, bool]]) -> None:
    variant, reference = columns(pairs)
    there, back = (paired_difference(a, b, resamples=50) for a, b in ((variant, reference), (reference, variant)))
    assert there.difference == -back.difference
    assert (there.lost, there.won) == (back.won, back.lost)


@given(SCORES)
def test_the_same_scores_never_differ(pairs: list[tuple[float, float]]) -> None:
    variant, _ = columns(pairs)
    found = paired_difference(variant, variant, resamples=50)
    assert (found.difference, found.stderr, found.low, found.high, found.p_value) == (0, 0, 0, 0, 1)
    assert found.within_noise


@given(SCORES, st.integers(0, 2**32))
def test_a_seed_gives_the_same_numbers(pairs: list[tuple[float, float]], seed: int) -> None:
    variant, reference = columns(pairs)
    first = paired_difference(variant, reference, resamples=50, seed=seed)
    assert paired_difference(variant, reference, resamples=50, seed=seed) == first


def test_the_standard_error_is_the_known_one() -> None:
    generator = np.random.default_rng(3)
    reference = (generator.random(500) < 0.6).astype(float)
    variant = np.where(generator.random(500) < 0.1, 1 - reference, reference)
    found = paired_difference(variant, reference)
    assert found.stderr == pytest.approx((variant - reference).std() / math.sqrt(500), rel=0.03)


def test_pairing_shows_what_separate_standard_errors_hide() -> None:
    reference = np.repeat([1.0, 0.0], 200)
    variant = reference.copy()
    variant[:12] = 0
    found = paired_difference(variant, reference)
    unpaired = math.sqrt(variant.var() / 400 + reference.var() / 400)
    assert abs(found.difference) < unpaired
    assert not found.within_noise


@pytest.mark.parametrize(
    ("lost", "noise"), [(1, True), (2, True), (3, True), (4, True), (5, True), (6, False), (8, False), (30, False)]
)
def test_few_changed_answers_are_noise(lost: int, noise: bool) -> None:
    reference = np.ones(400)
    variant = reference.copy()
    variant[:lost] = 0
    assert paired_difference(variant, reference).within_noise == noise


@given(st.integers(0, 24), st.integers(0, 24), st.integers(0, 300), st.sampled_from([1.0, 0.3, 40.0]))
def test_few_changed_answers_are_judged_by_mcnemars_exact_test_too(lost: int, won: int, same: int, size: float) -> None:
    changed = lost + won
    if not 0 < changed < FEW:
        return
    reference = np.repeat([size, 0.0, size], [lost, won, same])
    found = paired_difference(np.repeat([0.0, size, size], [lost, won, same]), reference, resamples=300)
    extreme = sum(math.comb(changed, k) for k in range(changed + 1) if abs(2 * k - changed) >= abs(lost - won))
    exact = extreme / 2**changed
    assert found.p_value >= exact * (1 - 1e-9)
    if exact >= 0.05:
        assert found.within_noise
        assert found.low <= 1e-9 * size
        assert found.high >= -1e-9 * size


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_five_changes_of_any_sizes_are_noise(sizes: list[float]) -> None:
    # All of one sign: 2 of the 2^n ways of giving signs are as extreme.
    variant = np.array([*sizes, *[0.0] * 50])
    found = paired_difference(variant, np.zeros_like(variant))
    assert found.p_value > 2 / 2 ** len(sizes) * 0.9
    # By chance alone 10,000 drawings of a probability of 1/16 give less than 1/20 once in 10 ** 7 times.
    assert found.within_noise


def test_few_changes_are_told_apart_no_oftener_than_promised() -> None:
    generator, trials, alarms = np.random.default_rng(5), 600, 0
    for trial in range(trials):
        changes = np.zeros(300)
        changes[: generator.integers(1, 15)] = 1
        variant = changes * np.where(generator.random(300) < 0.5, 1, -1)
        alarms += not paired_difference(variant, np.zeros(300), resamples=500, seed=trial).within_noise
    assert alarms <= 30


def test_equal_models_are_told_apart_in_one_of_twenty_comparisons() -> None:
    generator, trials, alarms = np.random.default_rng(11), 600, 0
    for trial in range(trials):
        # Each answers a third of the items at random, without being better at it.
        easy = generator.random(300) < 0.67
        answers = [np.where(easy, 1.0, generator.random(300) < 0.5) for _ in range(2)]
        alarms += not paired_difference(answers[0], answers[1], resamples=500, seed=trial).within_noise
    # 5 % of 600 is 30, with a standard deviation of 5.3.
    assert 12 <= alarms <= 50


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.integers(0, 1000))
def test_drawing_values_is_drawing_items(values: list[float], seed: int) -> None:
    array = np.array(values, np.float64)
    means = _resampled_means(array, 4000, np.random.default_rng(seed))
    error = float(array.std()) / math.sqrt(len(array))
    assert means.mean() == pytest.approx(array.mean(), abs=6 * error / math.sqrt(4000) + 1e-9)
    assert means.std() == pytest.approx(error, rel=0.15, abs=1e-9)
    assert means.min() >= array.min() - 1e-9
    assert means.max() <= array.max() + 1e-9


def test_chunks_do_not_change_the_number_of_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.bootstrap._NUMBERS_AT_ONCE", 30)
    values = np.linspace(0, 1, 7, dtype=np.float64)
    assert len(_resampled_means(values, 1001, np.random.default_rng(0))) == 1001


@pytest.mark.parametrize(
    ("variant", "reference"), [([], []), ([1.0], [1.0, 0.0]), ([math.nan], [0.0]), ([math.inf, 0.0], [0.0, 0.0])]
)
def test_what_cannot_be_compared_is_refused(variant: list[float], reference: list[float]) -> None:
    with pytest.raises(ValueError, match=r"items|finite"):
        paired_difference(np.array(variant), np.array(reference))
