"""Choosing tokens against transformers' logits processors, and text as it comes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from inference.sampling import Sampler, Sampling, choose, likeliest, penalize, probabilities
from inference.text import TextStream
from quantize.errors import InputError

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=50)


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=50), st.integers(0, 10), st.integers(0, 100))
def test_a_choice_is_among_the_top_k(logits: list[float], top_k: int, seed: int) -> None:
    values = torch.tensor(logits)
    generator = torch.Generator().manual_seed(seed)
    token = choose(values, Sampling(1.0, top_k, seed), generator)
    better = int((values > values[token]).sum())
    assert better < (top_k or len(logits))
    assert values[choose(values, Sampling(), generator)] == values.max()
    assert values[choose(values, Sampling(5.0, 1), generator)] == values.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_of_the_likeliest_tokens_is_taken(dtype: torch.dtype) -> None:
    assert likeliest(torch.tensor([1.0, 3.0, -2.0, 3.0, 2.0], dtype=dtype)) == 1
    assert likeliest(torch.full((9,), float("-inf"), dtype=dtype)) == 0


def test_choices_follow_the_softmax_at_the_temperature() -> None:
    logits, generator = torch.tensor([0.0, 1.0, 2.0, -9.0]), torch.Generator().manual_seed(3)
    counts = torch.bincount(torch.tensor([choose(logits, Sampling(0.5), generator) for _ in range(4000)]), minlength=4)
    torch.testing.assert_close(counts / 4000, torch.softmax(logits / 0.5, 0), atol=0.025, rtol=0)


@given(
    LOGITS,
    st.floats(0.1, 5),
    st.integers(0, 60),
    st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
    st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    st.sampled_from([1.0, 0.5, 1.3]),
    st.lists(st.integers(0, 1), max_size=5),
)
def test_probabilities_are_transformers(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seen: list[int]
) -> None:
    values = torch.tensor(logits, dtype=torch.float64)
    processors = LogitsProcessorList()
    if penalty != 1 and seen:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    wanted = torch.softmax(processors(torch.tensor([seen], dtype=torch.long), values[None].clone())[0], -1)
    sampling = Sampling(temperature, top_k, 0, top_p, min_p, penalty)
    found = probabilities(penalize(values, set(seen), penalty), sampling)
    kept = wanted > 0
    if int((found > 0).sum()) == int(kept.sum()):
        torch.testing.assert_close(found.sort().values, wanted.sort().values, atol=1e-12, rtol=1e-9)
    if len(set(logits)) == len(logits):  # equal logits at the edge may be kept by either order
        assert torch.equal(found > 0, kept)


def test_a_penalty_counts_prompt_and_new_tokens() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), [0])
    logits = torch.tensor([3.0, 2.0, 1.75, -1.0])
    assert [sampler.choose(logits) for _ in range(4)] == [1, 2, 0, 0]
    assert sampler.seen == {0, 1, 2}
    greedy = Sampler(Sampling())
    assert [greedy.choose(logits) for _ in range(2)] == [0, 0]


def test_a_request_draws_its_own_numbers() -> None:
    logits = torch.zeros(1000)
    alone = Sampler(Sampling(1.0, seed=5))
    wanted = [alone.choose(logits) for _ in range(5)]
    one, other = Sampler(Sampling(1.0, seed=5)), Sampler(Sampling(1.0, seed=6))
    mixed = [(one.choose(logits), other.choose(logits)) for _ in range(5)]
    assert [first for first, _ in mixed] == wanted != [second for _, second in mixed]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -2}, "top_k=-2"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
)
def test_bad_sampling_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


def streamed(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> tuple[str, bool]:
    """All of the text, piece by piece, and whether it was stopped."""
    stream = TextStream(tokenizer, stop)
    return "".join(stream.add(token) for token in ids) + stream.finish(), stream.stopped


@given(
    st.text("ab \u00e9\u20ac\U0001f600", min_size=1, max_size=30),
    st.lists(st.text("ab \u20ac", min_size=1, max_size=4), max_size=3),
)
def test_streamed_text_ends_before_the_first_stop_string(
    tiny_tokenizer: PreTrainedTokenizerFast, text: str, stop: list[str]
) -> None:
    tokenizer = tiny_tokenizer.backend_tokenizer
    ids = tokenizer.encode(text).ids
    found = [text.find(part) for part in stop if part in text]
    found_text, stopped = streamed(tokenizer, ids, stop)
    assert stopped == bool(found)
    if not found:
        assert found_text == text
    else:
        # Tokens may end several stop strings at once; the earliest in the text counts among those that have come by then.
        assert text.startswith(found_text)
        assert any(text.startswith(part, len(found_text)) for part in stop)


def test_an_empty_stop_string_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="stop='' would end every text"):
        TextStream(tiny_tokenizer.backend_tokenizer, [""])
