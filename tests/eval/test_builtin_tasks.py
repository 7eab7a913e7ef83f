"""The built-in items: right in form, varied, and of no use to a model that knows nothing."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import LM

from eval.tasks_run import BUILTIN, run_tasks

FILES = {"grammar": (2, 300), "cloze": (4, 180)}


def items(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (BUILTIN / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def everything() -> list[dict[str, Any]]:
    return [item for name in FILES for item in items(name)]


class ConstantLM(LM):  # type: ignore[misc]
    """Finds every text equally likely."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(self.value, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError


@pytest.mark.parametrize("name", FILES)
def test_every_item_is_whole(name: str) -> None:
    choices, least = FILES[name]
    found = items(name)
    assert len(found) >= least
    for item in found:
        assert item.keys() == {"kind", "context", "choices", "answer"}
        assert len(item["choices"]) == choices == len(set(item["choices"]))
        assert item["answer"] in range(choices)
        for text in (item["context"], *item["choices"]):
            assert text == " ".join(text.split()) and text and text.isascii(), item
        assert item["context"][0].isupper() and item["context"][-1] not in ".?!", item


def test_there_are_enough_items() -> None:
    assert len(everything()) >= 400


def test_no_sentence_is_there_twice() -> None:
    sentences = Counter(f"{item['context']} {choice}" for item in everything() for choice in item["choices"])
    assert [sentence for sentence, count in sentences.items() if count > 1] == []


def test_items_are_no_series_of_one_template() -> None:
    found = everything()
    starts = Counter(" ".join(item["context"].split()[:3]) for item in found if len(item["context"].split()) > 3)
    assert max(starts.values()) <= 5, starts.most_common(3)
    words = {
        word.strip(".,?!'").lower() for item in found for text in (item["context"], *item["choices"]) for word in text.split()
    }
    assert len(words) > 1200
    endings = Counter(tuple(sorted(item["choices"])) for item in found)
    assert max(endings.values()) <= 8, endings.most_common(3)
    assert min(Counter(item["kind"] for item in found).values()) >= 14


@pytest.mark.parametrize("name", FILES)
def test_the_right_answer_is_in_every_place_equally_often(name: str) -> None:
    places = Counter(item["answer"] for item in items(name))
    assert max(places.values()) - min(places.values()) <= 1
    # Kinds are mixed, so the first items are a fair sample.
    kinds = {item["kind"] for item in items(name)}
    assert {item["kind"] for item in items(name)[:80]} == kinds


@pytest.mark.parametrize("value", [0.0, -math.inf, math.nan])
def test_a_broken_model_scores_what_guessing_scores(value: float) -> None:
    parts = run_tasks(ConstantLM(value), ["builtin"])["builtin"]["parts"]
    assert parts["builtin_grammar"]["value"] == pytest.approx(1 / 2, abs=0.01)
    assert parts["builtin_cloze"]["value"] == pytest.approx(1 / 4, abs=0.01)


def test_the_files_are_installed_with_the_package() -> None:
    import tomllib

    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["eval"]
    covered = {path for pattern in patterns for path in BUILTIN.parent.glob(pattern)}
    assert covered == {path for path in BUILTIN.iterdir() if path.suffix in (".yaml", ".jsonl")}
    assert len(covered) == 5
