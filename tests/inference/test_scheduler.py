"""Continuous batching: whatever the order of events, each request gets the tokens it gets alone, and no block is lost."""

from __future__ import annotations

import functools
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from inference.engine import Engine
from inference.generate import generate
from inference.load import load
from inference.model import Model
from inference.paged import PagedCache
from inference.requests import Request, Result
from inference.sampling import Sampling
from inference.scheduler import Policy, Scheduler
from inference.static_batching import StaticBatching
from quantize.errors import InputError

SCHEDULES = 10_000
MARGIN = 1e-3  # between the two likeliest tokens of every greedy choice: batches round differently


@functools.cache
def model_of(path: Path) -> Model:
    """One model for all tests."""
    return load(path)


@functools.cache
def known(path: Path) -> list[tuple[Request, tuple[int, ...]]]:
    """Requests, some with equal beginnings, and what each gets alone."""
    engine, rng = Engine(model_of(path), 64), random.Random(5)
    shared = [rng.randrange(2, 300) for _ in range(13)]
    found: list[tuple[Request, tuple[int, ...]]] = []
    while len(found) < 24:
        prompt = shared[: rng.choice((0, 0, 8, 13))] + [rng.randrange(2, 300) for _ in range(rng.randint(1, 12))]
        sampling = Sampling() if rng.random() < 0.7 else Sampling(1.0, 20, rng.randrange(1000))
        request = Request(tuple(prompt), rng.randint(1, 14), sampling, stop=(1,) if rng.random() < 0.5 else range(290))
        if sampling.temperature or least_margin(engine, request) > MARGIN:
            alone = tuple(generate(engine, prompt, request.max_new_tokens, sampling, request.stop))
            found.append((request, alone))
    return found


def least_margin(engine: Engine, request: Request) -> float:
    """The smallest distance between the two largest logits on the way of a greedy text."""
    logits, least = engine.prefill(request.prompt), float("inf")
    for _ in range(request.max_new_tokens):
        first, second = logits.topk(2).values.tolist()
        least = min(least, first - second)
        logits = engine.decode(int(logits.argmax()))
    return least


def play(path: Path, rng: random.Random) -> None:
    """One random schedule: arrivals, priorities, cancellations, a small pool, any policy."""
    block_size = rng.choice((1, 2, 4, 8))
    policy = Policy(
        budget=rng.randint(4, 30),
        max_sequences=rng.randint(1, 4),
        preemption=rng.choice(("recompute", "swap")),
        swap_bytes=rng.choice((None, 0, 20_000)),
        aging=rng.choice((0, 5)),
        prefix_caching=rng.random() < 0.6,
    )
    # The longest request needs 38 places; from there on, room for one to room for all.
    cache = PagedCache(model_of(path).config, -(-38 // block_size) + rng.randrange(60) // block_size, block_size)
    scheduler, streams = Scheduler(model_of(path), cache, policy), defaultdict[int, list[int]](list)
    chosen = [rng.choice(known(path)) for _ in range(rng.randint(1, 9))]
    arrivals = sorted(rng.choice((0, 0, rng.randrange(30))) for _ in chosen)
    cancelled = {number: rng.randrange(40) for number in range(len(chosen)) if rng.random() < 0.2}
    results: dict[int, Result] = {}
    clock = 0
    while arrivals or not scheduler.idle:
        while arrivals and arrivals[0] <= clock:
            request = chosen[len(chosen) - len(arrivals)][0]
            arrivals.pop(0)
            request = Request(request.prompt, request.max_new_tokens, request.sampling, request.stop, rng.randrange(3))
            scheduler.submit(request, lambda number, token, reason: streams[number].append(token))
        for number in [number for number, when in cancelled.items() if when == clock]:
            scheduler.cancel(number)
        computed = scheduler.step()
        assert computed <= policy.budget and (computed > 0 or scheduler.idle)
        cache.allocator.check(cache.holders())
        assert len(cache.tables) == scheduler.running <= policy.max_sequences
        results |= scheduler.results()
        clock += 1
    assert cache.allocator.used == 0 and len(results) == len(chosen)
    for number, (_, alone) in enumerate(chosen):
        result = results[number]
        assert list(result.tokens) == streams[number]
        assert result.tokens == (alone[: len(result.tokens)] if result.reason == "cancelled" else alone)
        assert result.reason != "cancelled" or number in cancelled


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_any_schedule_gives_each_request_its_own_tokens(tiny_llama: Path, rng: random.Random) -> None:
    play(tiny_llama, rng)


@pytest.mark.slow
def test_ten_thousand_schedules(tmp_path: Path, make_checkpoint: Any) -> None:
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1
    )
    smallest: Path = make_checkpoint(tmp_path / "smallest", config)
    for seed in range(SCHEDULES):
        try:
            play(smallest, random.Random(seed))
        except Exception as error:
            raise AssertionError(f"schedule {seed}") from error


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_too_little_memory_preempts_and_changes_nothing(tiny_llama: Path, preemption: str) -> None:
    cache = PagedCache(model_of(tiny_llama).config, 10, 4)
    scheduler = Scheduler(model_of(tiny_llama), cache, Policy(preemption=preemption, prefix_caching=False))
    requests = [(request, alone) for request, alone in known(tiny_llama) if len(alone) > 6 and len(request.prompt) < 14][:6]
    for request, _ in requests:
        scheduler.submit(request)
    results = scheduler.run()
    assert [results[number].tokens for number in range(len(requests))] == [alone for _, alone in requests]
    assert scheduler.counts.preemptions > 0
    assert scheduler.counts.preemptions == sum(result.preemptions for result in results.values())
    assert (scheduler.counts.swapped_bytes > 0) == (preemption == "swap")


def test_a_long_prompt_does_not_stop_the_others(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    scheduler = Scheduler(model, PagedCache(model.config, 100, 4), Policy(budget=8, max_sequences=3))
    steps: dict[int, list[int]] = {0: [], 1: []}
    first = scheduler.submit(Request([5, 6], 12, stop=()), lambda *_: steps[0].append(scheduler.counts.steps))
    scheduler.step()
    scheduler.submit(Request([7] * 50, 2, stop=()), lambda *_: steps[1].append(scheduler.counts.steps))
    results = scheduler.run()
    assert steps[0] == list(range(1, 13))  # a token in every step, with the other's chunks of 7 beside it
    assert steps[1] == [9, 10]
    assert results[first].ttft > 0 and results[first].tpot > 0


def test_priorities_age(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    scheduler = Scheduler(model, PagedCache(model.config, 100, 4), Policy(budget=1, max_sequences=1, aging=4))
    ended: list[int] = []

    def note(number: int, token: int, reason: str | None) -> None:
        if reason:
            ended.append(number)
            if number < 5:
                scheduler.submit(Request([3], 2, stop=()), note)

    scheduler.submit(Request([3], 2, stop=(), priority=1), note)
    for _ in range(2):
        scheduler.submit(Request([3], 2, stop=()), note)
    scheduler.run()
    # It lets go first who is there and who comes within 4 iterations; newcomers after that wait for it.
    assert ended.index(0) == 3 and sorted(ended) == list(range(len(ended)))


def test_a_shared_prompt_is_computed_once(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    scheduler = Scheduler(model, PagedCache(model.config, 100, 4), Policy(budget=64))
    shared = list(range(10, 50))
    scheduler.submit(Request([*shared, 5], 3, stop=()))
    scheduler.run()
    before = scheduler.counts.computed_tokens
    number = scheduler.submit(Request([*shared, 6, 7], 1, stop=()))
    result = scheduler.run()[number]
    assert result.cached == 40 and scheduler.counts.computed_tokens == before + 2
    assert result.tokens == tuple(generate(Engine(model, 64), [*shared, 6, 7], 1, stop=()))
    assert scheduler.prefix is not None and scheduler.prefix.hits == 40


def test_callbacks_may_cancel_submit_and_fail(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    scheduler = Scheduler(model, PagedCache(model.config, 100, 4))
    more: list[int] = []

    def cancel_both(number: int, token: int, reason: str | None) -> None:
        assert scheduler.cancel(number) and scheduler.cancel(1) and not scheduler.cancel(99)
        more.append(scheduler.submit(Request([4], 2, stop=())))

    def fail(number: int, token: int, reason: str | None) -> None:
        raise OSError("the other side has hung up")

    for callback in (cancel_both, None, fail):
        scheduler.submit(Request([4, 5], 8, stop=()), callback)
    results = scheduler.run()
    assert [(results[number].reason, len(results[number].tokens)) for number in range(3)] == [
        ("cancelled", 1),
        ("cancelled", 0),
        ("callback", 1),
    ]
    assert isinstance(results[2].error, OSError)
    assert results[more[0]].reason == "length"
    assert scheduler.cache.allocator.used == 0 and not scheduler.cancel(0)


@pytest.mark.parametrize("batch", [1, 3, 24])
def test_static_batches_give_the_same_tokens_and_count_their_padding(tiny_llama: Path, batch: int) -> None:
    static = StaticBatching(model_of(tiny_llama), batch)
    results = static.run([request for request, _ in known(tiny_llama)])
    assert [result.tokens for result in results] == [alone for _, alone in known(tiny_llama)]
    needed = sum(len(request.prompt) + len(alone) - 1 for request, alone in known(tiny_llama))
    assert static.padding.useful_tokens == static.padding.filled_tokens == needed
    assert (static.padding.computed_waste == 0) == (batch == 1)
    assert 0 <= static.padding.cache_waste < 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 1), "the prompt has no tokens"),
        (Request([300], 1), "token id 300 is outside the vocabulary; use 0 to 299"),
        (Request([3], 0), "max_new_tokens=0 asks for nothing"),
        (Request([3], 1, priority=-1), "priority=-1 goes before the ordinary"),
        (Request([3] * 5, 13), "does not fit into a cache of 16 tokens; use at most 12"),
    ],
)
def test_bad_requests_are_refused(tiny_llama: Path, request_: Request, message: str) -> None:
    model = model_of(tiny_llama)
    scheduler = Scheduler(model, PagedCache(model.config, 4, 4))
    with pytest.raises(InputError, match=message):
        scheduler.submit(request_)
    assert scheduler.idle


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"max_sequences": 0}, "max_sequences=0 runs nothing"),
        ({"budget": 3, "max_sequences": 4}, "budget=3 is less than a token for each of max_sequences=4; use 4"),
        ({"preemption": "none"}, "preemption='none' is not an option; use recompute, swap"),
        ({"aging": -1}, "aging=-1 iterations"),
    ],
)
def test_bad_policies_are_refused(policy: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Policy(**policy)  # type: ignore[arg-type]


def test_a_batch_that_cannot_be_padded_is_refused(tiny_llama: Path) -> None:
    model = model_of(tiny_llama)
    with pytest.raises(InputError, match="max_tokens=3004 is outside the model's context"), torch.inference_mode():
        StaticBatching(model, 2).run([Request([3] * 1505, 1), Request([3], 1500)])
