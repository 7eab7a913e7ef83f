"""Beam search against transformers', parallel samples against samples drawn alone; blocks shared and given back."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from inference.beam import BeamSearch, parallel_samples
from inference.engine import Engine
from inference.generate import generate
from inference.load import load
from inference.model import Model
from inference.paged import PagedCache
from inference.requests import Request
from inference.sampling import Sampling
from quantize.errors import InputError

PROMPT = [5, 17, 299, 0, 44, 44, 120]


@functools.cache
def model_of(path: Path) -> Model:
    """One model for all tests."""
    return load(path)


@pytest.mark.parametrize("stop", [(), (1,), tuple(range(2, 300, 10))])
@pytest.mark.parametrize(("beams", "penalty", "early"), [(1, 1.0, False), (4, 1.0, False), (3, 0.0, True), (5, 2.0, False)])
def test_beams_are_transformers(tiny_llama: Path, stop: tuple[int, ...], beams: int, penalty: float, early: bool) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    reference.generation_config.eos_token_id = list(stop) or None
    out = reference.generate(
        torch.tensor([PROMPT]),
        num_beams=beams,
        do_sample=False,
        max_new_tokens=12,
        length_penalty=penalty,
        early_stopping=early,
        num_return_sequences=beams,
        return_dict_in_generate=True,
        output_scores=True,
    )
    model = model_of(tiny_llama)
    cache = PagedCache(model.config, 40, 4)
    found = BeamSearch(model, cache, beams, penalty, early).run(PROMPT, 12, stop)
    assert cache.allocator.used == 0
    if beams == 1:  # transformers calls one beam greedy search
        assert list(found[0].tokens) == out.sequences[0, len(PROMPT) :].tolist()
        return
    for hypothesis, sequence, score in zip(found, out.sequences, out.sequences_scores, strict=True):
        assert list(hypothesis.tokens) == sequence[len(PROMPT) :][: len(hypothesis.tokens)].tolist()
        assert hypothesis.score == pytest.approx(float(score), abs=1e-4)


def test_samples_are_those_drawn_alone_and_hold_the_prompt_once(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    cache = PagedCache(model.config, 200, 4)
    request = Request(PROMPT, 10, Sampling(1.5, 0, seed=4), stop=range(250))
    texts = parallel_samples(model, cache, request, 5)
    alone = [list(generate(Engine(model, 64), PROMPT, 10, Sampling(1.5, 0, 4 + i), range(250))) for i in range(5)]
    assert [list(text) for text in texts] == alone
    assert len(set(texts)) > 1
    assert cache.allocator.used == 0
    # The prompt fills a block and a part of another: that part is copied for all but the last who writes to it.
    running = sum(len(text) > 1 for text in texts)
    assert 1 <= cache.copies <= running


def test_a_full_cache_leaves_nothing_behind(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    cache = PagedCache(model.config, 5, 4)
    with pytest.raises(InputError, match="blocks of 4 tokens are needed"):
        BeamSearch(model, cache, 6).run(PROMPT, 10, ())
    with pytest.raises(InputError, match="blocks of 4 tokens are needed"):
        parallel_samples(model, cache, Request(PROMPT, 10, stop=()), 6)
    kept = cache.open()
    cache.context([13], [kept]).advance()
    with pytest.raises(InputError, match="2 blocks of 4 tokens are needed and 1 of blocks=5 are free"):
        BeamSearch(model, cache, 1).run(PROMPT, 10, ())
    assert list(cache.tables) == [kept] and cache.allocator.used == 4


def test_bad_numbers_are_refused(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    cache = PagedCache(model.config, 5, 4)
    with pytest.raises(InputError, match="beams=0 keeps nothing"):
        BeamSearch(model, cache, 0)
    with pytest.raises(InputError, match="count=0 asks for nothing"):
        parallel_samples(model, cache, Request(PROMPT, 2), 0)
    with pytest.raises(InputError, match="the prompt has no tokens"):
        BeamSearch(model, cache, 2).run([], 3)
