"""Guessing changes the number of forwards and never the text."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from inference.engine import Engine
from inference.generate import generate
from inference.load import load
from inference.model import Model
from inference.sampling import Sampling
from inference.speculative import Drafter, DraftModel, PromptLookup, Speculator
from quantize.errors import InputError

PROMPTS = ([5, 6, 7, 5, 6, 7, 5], [40], list(range(30, 60)))


@functools.cache
def model_of(path: Path) -> Model:
    """One model for all tests."""
    return load(path)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Model:
    """A smaller random model of the same vocabulary."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1
    )
    return load(make_checkpoint(tmp_path_factory.mktemp("draft") / "draft", config))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.3, 5, seed=3)])
@pytest.mark.parametrize("kind", ["lookup", "itself", "other"])
def test_the_text_is_the_one_without_guessing(tiny_llama: Path, other: Model, kind: str, sampling: Sampling) -> None:
    model = model_of(tiny_llama)
    drafters: dict[str, Drafter] = {"lookup": PromptLookup(), "itself": DraftModel(model, 96), "other": DraftModel(other, 96)}
    speculator = Speculator(model, drafters[kind], 4, 96)
    for prompt in PROMPTS:
        for tokens in (1, 2, 37):
            wanted = list(generate(Engine(model, 96), prompt, tokens, sampling, stop=()))
            assert list(speculator.generate(prompt, tokens, sampling, stop=())) == wanted
    found = speculator.acceptance
    assert found.made == 3 * 40 and found.accepted <= found.proposed
    assert found.forwards == found.made - found.accepted
    if kind == "itself" and sampling.temperature == 0:
        assert found.rate == 1  # the model's guesses at its own choices
    assert 0 <= found.rate <= 1


def test_a_stop_token_ends_the_text_within_a_guess(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    free = list(generate(Engine(model, 64), [3, 4], 20, stop=()))
    speculator = Speculator(model, DraftModel(model, 64), 5, 64)
    assert list(speculator.generate([3, 4], 20, stop=[free[7]])) == free[: free.index(free[7]) + 1]
    assert list(speculator.generate([3, 4], 20, stop=())) == free
    assert list(speculator.generate([3, 4], 0)) == []


def naive_lookup(tokens: list[int], count: int, longest: int) -> list[int]:
    """The definition: the latest earlier place of the longest run of last tokens."""
    for size in range(min(longest, len(tokens)), 0, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                return tokens[end : end + count]
    return []


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=8), min_size=1, max_size=5), st.integers(1, 3), st.booleans())
def test_lookup_finds_what_followed_last_time(pieces: list[list[int]], longest: int, same_text: bool) -> None:
    lookup, text = PromptLookup(longest), list[int]()
    for piece in pieces:
        text = text + piece if same_text else piece
        assert lookup.propose(text, 3) == naive_lookup(text, 3, longest)


def test_bad_settings_are_refused(tiny_llama: Path, make_checkpoint: Any, tmp_path: Path) -> None:
    model = model_of(tiny_llama)
    with pytest.raises(InputError, match="lookahead=0 guesses nothing"):
        Speculator(model, PromptLookup(), 0)
    with pytest.raises(InputError, match="longest=0 tokens are found everywhere"):
        PromptLookup(0)
    config = LlamaConfig(vocab_size=299, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(InputError, match="the draft's vocab_size=299 is not the model's 300"):
        Speculator(model, DraftModel(load(make_checkpoint(tmp_path / "narrow", config)), 16))
    for prompt, tokens in (([], 3), ([3] * 10, 8)):
        with pytest.raises(InputError, match="do not fit into max_tokens=16"):
            list(Speculator(model, PromptLookup(), 4, 16).generate(prompt, tokens))
