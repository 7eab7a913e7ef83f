"""Rows of the bench about many sequences: batches, pages, shared prompts."""

from __future__ import annotations

import random
import statistics
import time
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from inference.bench_cases import Bench, Row, ratios, stopwatch
from inference.context import Context
from inference.model import Model
from inference.paged import PagedCache
from inference.requests import Request
from inference.scheduler import Policy, Scheduler
from inference.static_batching import StaticBatching

SHORTEST, LONGEST = 16, 256  # of prompts and texts of the trace
BLOCK_SIZE = 8


def trace(bench: Bench, skewed: bool) -> list[Request]:
    """Requests whose prompts and texts have lengths from 16 to 256, log-uniform where ``skewed``, else uniform."""
    rng = random.Random(1)

    def length() -> int:
        return round(SHORTEST * (LONGEST / SHORTEST) ** rng.random()) if skewed else rng.randint(SHORTEST, LONGEST)

    return [Request(bench.ids(length(), seed), length(), stop=()) for seed in range(bench.requests)]


def _cache(bench: Bench, model: Model, block_size: int) -> PagedCache:
    return PagedCache(model.config, bench.batch * -(-2 * LONGEST // block_size), block_size, native=model.native)


def continuous(model: Model, bench: Bench, requests: list[Request], block_size: int = BLOCK_SIZE) -> tuple[float, float]:
    """All requests, there from the start: seconds, and the mean share of held cache that is empty."""
    cache = _cache(bench, model, block_size)
    scheduler = Scheduler(model, cache, Policy(max_sequences=bench.batch, prefix_caching=False))
    for request in requests:
        scheduler.submit(request)
    waste, spent = [], 0.0
    while not scheduler.idle:
        spent += stopwatch(scheduler.step)
        if scheduler.running:
            waste.append(cache.waste())
    return spent, statistics.mean(waste)


def static_eight(bench: Bench) -> Row:
    """A batch of 8 equal requests against the same ones one by one."""
    requests = [Request(bench.ids(bench.prompt, seed), bench.tokens, stop=()) for seed in range(8)]
    eight, one = bench.turns(
        lambda: stopwatch(lambda: StaticBatching(bench.fp32_step, 8).run(requests)),
        lambda: stopwatch(lambda: StaticBatching(bench.fp32_step, 1).run(requests)),
    )
    made = 8 * bench.tokens
    detail = (
        f"fp32, 8 requests, prefill included: {made / statistics.median(eight):.1f} tokens/s together, "
        f"{made / statistics.median(one):.1f} one by one"
    )
    return Row("static batch 8 against 1, throughput", 4, ratios(one, eight), detail)


def against_static(bench: Bench) -> list[Row]:
    """The trace in continuous and in static batches; and how much of the pages is empty meanwhile."""
    rows, waste = [], list[float]()
    for skewed, goal in ((True, 1.8), (False, None)):
        requests = trace(bench, skewed)
        static = StaticBatching(bench.fp32_step, bench.batch)

        def paged(requests: list[Request] = requests, skewed: bool = skewed) -> float:
            seconds, empty = continuous(bench.fp32_step, bench, requests)
            if skewed:
                waste.append(100 * empty)
            return seconds

        def padded(requests: list[Request] = requests, static: StaticBatching = static) -> float:
            return stopwatch(lambda: static.run(requests))

        # Minutes a round: once is enough for a row without a goal.
        fast, slow = bench.turns(paged, padded, rounds=None if goal else 1)
        made = sum(request.max_new_tokens for request in requests)
        detail = (
            f"fp32, {len(requests)} requests of {SHORTEST}-{LONGEST} + {SHORTEST}-{LONGEST} tokens, {bench.batch} at a time: "
            f"{made / statistics.median(fast):.1f} tokens/s continuous, {made / statistics.median(slow):.1f} static, where "
            f"{100 * static.padding.computed_waste:.0f} % of the rows and "
            f"{100 * static.padding.cache_waste:.0f} % of the cache are padding"
        )
        shape = "log-uniform" if skewed else "uniform"
        rows.append(Row(f"continuous against static batching, {shape} lengths, throughput", goal, ratios(slow, fast), detail))
    sizes = ", ".join(f"{100 * share:.1f} % with {size}" for size, share in waste_by_block_size(bench).items())
    detail = f"mean over the steps of the log-uniform trace, blocks of {BLOCK_SIZE} tokens; by block size: {sizes}"
    rows.append(Row("paged KV waste", 4, tuple(waste), detail, at_least=False, unit=" %"))
    return rows


def waste_by_block_size(bench: Bench) -> dict[int, float]:
    """Empty share of held pages for several block sizes: the schedule depends on lengths alone, so no model is run."""
    config = SimpleNamespace(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        max_tokens=2 * LONGEST,
        vocab_size=bench.fp32.config.vocab_size,
        stop_tokens=(),
    )

    def forward(tokens: Tensor, context: Context, rows: Tensor) -> Tensor:
        context.advance()
        return torch.zeros(len(rows), 1)

    nothing = cast(Model, SimpleNamespace(config=config, device=torch.device("cpu"), native=False, forward=forward))
    return {size: continuous(nothing, bench, trace(bench, True), size)[1] for size in (4, 8, 16, 32, 64)}


def shared_prompt(bench: Bench) -> Row:
    """Time to first token after a prompt of 512 tokens that another request has had, and 16 of its own."""
    common = bench.ids(512)
    policy = Policy(budget=1024)

    def first_token(scheduler: Scheduler, seed: int) -> float:
        started = time.perf_counter()
        scheduler.submit(Request([*common, *bench.ids(16, seed)], 1, stop=()))
        scheduler.run()
        return time.perf_counter() - started

    def scheduler() -> Scheduler:
        return Scheduler(bench.fp32, PagedCache(bench.fp32.config, -(-576 // BLOCK_SIZE), BLOCK_SIZE), policy)

    def cold() -> float:
        return first_token(scheduler(), 1)

    def warm() -> float:
        used = scheduler()
        first_token(used, 1)
        return first_token(used, 2)

    fast, slow = bench.turns(warm, cold)
    known, unknown = (1000 * statistics.median(seconds) for seconds in (fast, slow))
    detail = f"fp32, 528 tokens: {known:.0f} ms with the prefix known, {unknown:.0f} without"
    return Row("prefix cache, 512-token shared prompt, time to first token", 8, ratios(slow, fast), detail)
