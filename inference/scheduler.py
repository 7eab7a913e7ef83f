"""Continuous batching: which sequences run in the next forward is decided anew before each (Orca, Yu et al. 2022, OSDI).

A batch never has to end: a request joins when there is room, leaves with its last token, and the others do not notice. Prompts
are computed in chunks beside the steps of those already generating (Sarathi-Serve, Agrawal et al. 2024, arXiv:2403.02310), so
a long prompt delays nobody by more than one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import torch

from inference.context import last_rows
from inference.model import Model
from inference.paged import PagedCache
from inference.prefix import PrefixCache
from inference.requests import OnToken, Request, Result, Work
from quantize.errors import InputError

PREEMPTION = ("recompute", "swap")


@dataclass(frozen=True)
class Policy:
    """How a scheduler shares the machine.

    Attributes:
        budget: tokens of a forward, at least ``max_sequences``: one for each sequence that generates, the rest for prompts.
        max_sequences: that have keys in the cache at one time.
        preemption: what happens to a sequence that must give up its blocks: ``recompute`` forgets its keys and computes them
            again, ``swap`` copies them out of the pool and back.
        swap_bytes: the most that is kept outside; what does not fit is recomputed. None for no limit.
        aging: iterations that a request of priority 1 lets others go first, 2 of those for priority 2, and so on. Nobody who
            arrives later than that overtakes it, so nobody waits for ever.
        prefix_caching: whether prompts with equal beginnings share them.
    """

    budget: int = 256
    max_sequences: int = 16
    preemption: str = "recompute"
    swap_bytes: int | None = None
    aging: int = 64
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        if self.max_sequences < 1:
            raise InputError(f"scheduler: max_sequences={self.max_sequences} runs nothing; use 1 or more")
        if self.budget < self.max_sequences:
            raise InputError(
                f"scheduler: budget={self.budget} is less than a token for each of max_sequences={self.max_sequences}; "
                f"use {self.max_sequences} or more"
            )
        if self.preemption not in PREEMPTION:
            raise InputError(f"scheduler: preemption={self.preemption!r} is not an option; use {', '.join(PREEMPTION)}")
        if self.aging < 0:
            raise InputError(f"scheduler: aging={self.aging} iterations; use 0 (priorities count for nothing) or more")


@dataclass
class Counts:
    """What a scheduler has done so far; ``swapped_bytes`` in both directions together."""

    steps: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    swapped_bytes: int = 0


class Scheduler:
    """Runs requests of any lengths, arriving at any time, on one model and one pool of blocks.

    First come, first served: requests are admitted in their order and nobody who does not fit is overtaken. Where blocks
    run out, the last in the order gives up its own; the first one always gets on. Each request gets the tokens it would get
    alone.

    Attributes:
        cache: the pool.
        prefix: the cache of prefixes, None where the policy has none.
        counts: what has been done.
    """

    def __init__(self, model: Model, cache: PagedCache, policy: Policy | None = None) -> None:
        """``cache`` is this scheduler's alone."""
        self.cache, self.policy = cache, policy or Policy()
        self.prefix = PrefixCache(cache) if self.policy.prefix_caching else None
        self.counts = Counts()
        self._model = model
        self._waiting: list[Work] = []
        self._running: list[Work] = []
        self._results: dict[int, Result] = {}
        self._arrivals = self._outside = 0
        self._stepping = False

    def submit(self, request: Request, on_token: OnToken | None = None) -> int:
        """Put a request in line.

        Args:
            request: what to continue.
            on_token: called with the request's number, each new token, and the reason why it is the last or None. May submit
                and cancel; an exception ends this request alone and is in its result.

        Returns:
            Its number.

        Raises:
            InputError: it could not run even alone.
        """
        request.check(self._model.config, self.cache.max_tokens)
        number = self._arrivals
        self._arrivals += 1
        order = self.counts.steps + request.priority * self.policy.aging
        self._waiting.append(Work(number, order, request, self._model.config, on_token))
        return number

    def cancel(self, number: int) -> bool:
        """End a request; whether it was still there. Its result has the tokens it got so far."""
        for work in self._waiting + self._running:
            if work.number == number and work.reason is None:
                work.reason = "cancelled"
                if not self._stepping:
                    self._sweep()
                return True
        return False

    @property
    def idle(self) -> bool:
        """Nothing is waiting or running."""
        return not self._waiting and not self._running

    @property
    def running(self) -> int:
        """Sequences in the cache."""
        return len(self._running)

    def results(self) -> dict[int, Result]:
        """What has ended since the last call, by number."""
        ended, self._results = self._results, {}
        return ended

    def run(self) -> dict[int, Result]:
        """Step until nothing is left to do; the results as of :meth:`results`."""
        while not self.idle:
            self.step()
        return self.results()

    @torch.inference_mode()
    def step(self) -> int:
        """One forward for everybody whose turn it is; the number of tokens it computed, 0 where there was nothing to do."""
        plan = self._plan()
        if not plan:
            return 0
        counts = [count for _, count in plan]
        slots = [work.slot for work, _ in plan if work.slot is not None]
        device = self._model.device
        tokens = [
            token
            for (work, count), slot in zip(plan, slots, strict=True)
            for token in work.tokens[self.cache.tables[slot].length :][:count]
        ]
        context = self.cache.context(counts, slots)
        logits = self._model.forward(torch.tensor(tokens, device=device), context, last_rows(counts, device)).float()
        self.counts.steps += 1
        self.counts.computed_tokens += len(tokens)
        likeliest = logits.argmax(-1).tolist()
        self._stepping = True
        try:
            for row, (work, slot) in enumerate(zip((work for work, _ in plan), slots, strict=True)):
                if self.prefix is not None:
                    self.prefix.store(slot, work.tokens)
                if self.cache.tables[slot].length == len(work.tokens) and work.reason is None:
                    work.take(likeliest[row] if work.greedy else work.choose(logits[row]))
                    self.counts.generated_tokens += 1
        finally:
            self._stepping = False
            self._sweep()
        return len(tokens)

    def _plan(self) -> list[tuple[Work, int]]:
        """Who runs, and how many tokens of each: those in the cache first, in their order, then who is waiting."""
        self._running.sort(key=attrgetter("key"))
        left = {work.number: self._left(work) for work in self._running}
        prompts = self.policy.budget - sum(count == 1 for count in left.values())
        plan: list[tuple[Work, int]] = []
        promised, crowded = 0, False  # blocks that the plan takes
        for work in list(self._running):
            if work not in self._running:  # gave up its blocks to one before it
                continue
            count = 1 if left[work.number] == 1 else min(left[work.number], prompts)
            if count == 0:
                continue
            needed = self._needed(work, count)
            while promised + needed > self.cache.allocator.free and work in self._running:
                crowded = True
                self._preempt(self._running[-1])
            if work in self._running:
                promised += needed
                plan.append((work, count))
                prompts -= count if left[work.number] > 1 else 0
        return plan if crowded else plan + self._admit(prompts)

    def _admit(self, prompts: int) -> list[tuple[Work, int]]:
        admitted: list[tuple[Work, int]] = []
        for work in sorted(self._waiting, key=attrgetter("key")):
            if prompts == 0 or len(self._running) == self.policy.max_sequences or not self._fits(work):
                break
            self._enter(work)
            count = min(self._left(work), prompts)
            prompts -= count
            admitted.append((work, count))
        return admitted

    def _fits(self, work: Work) -> bool:
        """Whether its whole text so far has room beside those running: theirs so far, and a block each to go on with."""
        found = self.prefix.lookup(work.tokens) if self.prefix is not None and work.pages is None else []
        held = sum(self.cache.allocator.references(block) > 0 for block in found)
        needed = self.cache.blocks_for(len(work.tokens)) - held
        for other in self._running:
            assert other.slot is not None
            needed += 1 + self.cache.blocks_for(len(other.tokens)) - len(self.cache.tables[other.slot].blocks)
        return needed <= self.cache.allocator.free

    def _enter(self, work: Work) -> None:
        if work.pages is not None:
            work.slot = self.cache.put_back(work.pages)
            self.counts.swapped_bytes += work.pages.nbytes()
            self._outside -= work.pages.nbytes()
            work.pages = None
        else:
            work.slot = self.cache.open() if self.prefix is None else self.prefix.open(work.tokens)
            if work.cached is None:
                work.cached = self.cache.tables[work.slot].length
        self._waiting.remove(work)
        self._running.append(work)

    def _left(self, work: Work) -> int:
        """Tokens that are not in the cache yet."""
        assert work.slot is not None
        return len(work.tokens) - self.cache.tables[work.slot].length

    def _needed(self, work: Work, count: int) -> int:
        assert work.slot is not None
        return self.cache.blocks_needed([count], [work.slot])

    def _preempt(self, work: Work) -> None:
        assert work.slot is not None
        table = self.cache.tables[work.slot]
        size = len(table.blocks) * self.cache.nbytes() // self.cache.allocator.total
        limit = self.policy.swap_bytes
        if self.policy.preemption == "swap" and table.length and (limit is None or self._outside + size <= limit):
            work.pages = self.cache.take_out(work.slot)
            self.counts.swapped_bytes += size
            self._outside += size
        else:
            self.cache.close(work.slot)
        work.slot = None
        work.preemptions += 1
        self.counts.preemptions += 1
        self._running.remove(work)
        self._waiting.append(work)

    def _sweep(self) -> None:
        """Who has ended gives back all it holds."""
        for line in (self._waiting, self._running):
            for work in [work for work in line if work.reason is not None]:
                line.remove(work)
                if work.slot is not None:
                    self.cache.close(work.slot)
                if work.pages is not None:
                    self._outside -= work.pages.nbytes()
                self._results[work.number] = work.result()
