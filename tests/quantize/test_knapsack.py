"""The multiple-choice knapsack against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantize import knapsack
from quantize.knapsack import Knapsack, Option

OPTION = st.builds(Option, st.integers(1, 60), st.floats(0, 10, allow_nan=False, width=16))
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=3), min_size=1, max_size=5)


def brute_force(items: list[list[Option]], budget: int) -> float:
    """The least cost of all choices that fit."""
    fitting = (pick for pick in itertools.product(*items) if sum(option.size for option in pick) <= budget)
    return min(sum(option.cost for option in pick) for pick in fitting)


@settings(max_examples=150, deadline=None)
@given(items=ITEMS, room=st.integers(0, 300))
def test_it_is_what_brute_force_finds(items: list[list[Option]], room: int) -> None:
    solved = Knapsack(items)
    budget = solved.smallest + room
    size, cost = solved.total(solved.choose(budget))
    assert solved.exact and size <= budget
    assert cost == pytest.approx(brute_force(items, budget))


@settings(max_examples=60, deadline=None)
@given(items=ITEMS)
def test_a_larger_budget_is_never_worse(items: list[list[Option]]) -> None:
    solved = Knapsack(items)
    costs = [solved.total(solved.choose(budget))[1] for budget in range(solved.smallest, solved.largest + 5)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(costs))
    line = solved.line()
    assert line[0][0] == solved.smallest or len(items) > 0
    assert all(one[0] < two[0] and one[1] > two[1] for one, two in itertools.pairwise(line))
    assert line[-1][1] == pytest.approx(costs[-1])


@settings(max_examples=60, deadline=None)
@given(items=ITEMS, room=st.integers(0, 300))
def test_coarse_units_keep_the_budget(items: list[list[Option]], room: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_MOST_BINS", 7)
        solved = Knapsack(items)
        budgets = [solved.smallest, solved.smallest + room, solved.largest]
        found = [solved.total(solved.choose(budget)) for budget in budgets]
    assert all(size <= budget for (size, _), budget in zip(found, budgets, strict=True))
    assert found[-1][1] <= found[0][1] + 1e-9


def test_impossible_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="below the 5"):
        Knapsack([[Option(5, 1.0)]]).choose(4)
    with pytest.raises(ValueError, match="at least one option"):
        Knapsack([[]])
