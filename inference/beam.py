"""Several continuations of one prompt whose common part is stored once: parallel sampling and beam search on forked sequences.

A fork names the same blocks (:mod:`inference.paged`), so ``n`` samples of a prompt hold it once, and a beam that gives way to
two continuations of another costs the copy of at most one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inference.model import Model
from inference.paged import PagedCache
from inference.requests import Request, Work
from quantize.errors import InputError


@dataclass(frozen=True)
class Hypothesis:
    """A continuation, a stop token its last, and its score: the sum of log probabilities over ``length ** length_penalty``."""

    tokens: tuple[int, ...]
    score: float


@torch.inference_mode()
def parallel_samples(model: Model, cache: PagedCache, request: Request, count: int) -> list[tuple[int, ...]]:
    """``count`` texts of one prompt; text ``i`` is the one that seed ``request.sampling.seed + i`` gives alone.

    Raises:
        InputError: fewer than one, a bad request, or the cache is full; nothing is left in the cache then.
    """
    if count < 1:
        raise InputError(f"samples: count={count} asks for nothing; use 1 or more")
    request.check(model.config, cache.max_tokens)
    works = []
    for index in range(count):
        sampling = replace(request.sampling, seed=request.sampling.seed + index)
        works.append(Work(index, 0, replace(request, sampling=sampling), model.config))
    slots: dict[int, int] = {}
    try:
        first, logits = _prefill(model, cache, request.prompt)
        slots[0] = first
        for work in works:
            slots.setdefault(work.number, cache.fork(first) if work.number else first)
        rows = logits.expand(count, -1)
        while True:
            for work, row in zip([work for work in works if work.reason is None], rows, strict=True):
                work.take(work.choose(row))
                if work.reason is not None:
                    cache.close(slots.pop(work.number))
            running = [work for work in works if work.reason is None]
            if not running:
                return [work.result().tokens for work in works]
            rows = _decode(model, cache, [work.tokens[-1] for work in running], [slots[work.number] for work in running])
    finally:
        for slot in slots.values():
            cache.close(slot)


class BeamSearch:
    """Keeps the ``beams`` likeliest beginnings; as transformers' ``generate(num_beams=..., do_sample=False)``."""

    def __init__(
        self, model: Model, cache: PagedCache, beams: int, length_penalty: float = 1.0, early_stopping: bool = False
    ) -> None:
        """Search with ``beams`` beginnings at a time.

        Args:
            model: the weights.
            cache: room for the beams; other sequences in it are left alone.
            beams: at least one.
            length_penalty: above 0 favours long texts, below 0 short ones.
            early_stopping: end with the first ``beams`` finished texts, not when no better one is to be expected.

        Raises:
            InputError: no beam.
        """
        if beams < 1:
            raise InputError(f"beam search: beams={beams} keeps nothing; use 1 or more")
        self._model, self._cache, self._beams = model, cache, beams
        self._penalty, self._early = length_penalty, early_stopping

    @torch.inference_mode()
    def run(self, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[int] | None = None) -> list[Hypothesis]:
        """The best finished texts, the best first; those of ``max_new_tokens`` are finished too.

        Raises:
            InputError: a bad prompt, or the cache is full; nothing is left in the cache then.
        """
        Request(prompt, max_new_tokens).check(self._model.config, self._cache.max_tokens)
        stop = self._model.config.stop_tokens if stop is None else tuple(stop)
        slots: list[int] = []
        try:
            first, logits = _prefill(self._model, self._cache, prompt)
            slots.append(first)
            scores, finished = torch.zeros(1, device=logits.device), list[Hypothesis]()
            texts: list[tuple[int, ...]] = [()]
            for length in range(1, max_new_tokens + 1):
                totals = torch.log_softmax(logits, -1) + scores[:, None]
                last = length == max_new_tokens
                alive = self._split(totals, texts, stop, last, finished, length)
                if last or self._done(alive, finished, length):
                    break
                self._follow(slots, [parent for parent, _, _ in alive])
                texts = [(*texts[parent], token) for parent, token, _ in alive]
                scores = torch.tensor([score for *_, score in alive], device=logits.device)
                logits = _decode(self._model, self._cache, [text[-1] for text in texts], slots)
            return sorted(finished, key=lambda hypothesis: -hypothesis.score)[: self._beams]
        finally:
            for slot in slots:
                self._cache.close(slot)

    def _split(
        self,
        totals: Tensor,
        texts: list[tuple[int, ...]],
        stop: Sequence[int],
        last: bool,
        finished: list[Hypothesis],
        length: int,
    ) -> list[tuple[int, int, float]]:
        """The best continuations: those that end among the first ``beams`` are finished; the others, ``(beam, token, sum)``."""
        # Enough that ``beams`` are left when as many as there are stop tokens end each beam.
        count = min(totals.numel(), max(2, 1 + len(stop)) * self._beams)
        sums, places = totals.flatten().topk(count)
        alive: list[tuple[int, int, float]] = []
        for rank, (total, place) in enumerate(zip(sums.tolist(), places.tolist(), strict=True)):
            parent, token = divmod(place, totals.shape[1])
            if last or token in stop:
                if rank < self._beams:
                    finished.append(Hypothesis((*texts[parent], token), total / length**self._penalty))
            elif len(alive) < self._beams:
                alive.append((parent, token, total))
        finished.sort(key=lambda hypothesis: -hypothesis.score)
        del finished[self._beams :]
        return alive

    def _done(self, alive: list[tuple[int, int, float]], finished: list[Hypothesis], length: int) -> bool:
        """Whether the search ends here: enough texts, and the best beam, were it to end now, would not be among them."""
        if not alive:
            return True
        if len(finished) < self._beams:
            return False
        return self._early or alive[0][2] / length**self._penalty <= finished[-1].score

    def _follow(self, slots: list[int], parents: list[int]) -> None:
        """Make ``slots`` the sequences of the beams that go on: forks of their parents, whose own end."""
        before = list(slots)
        slots.extend(self._cache.fork(before[parent]) for parent in parents)
        for slot in before:
            self._cache.close(slot)
        del slots[: len(before)]


def _prefill(model: Model, cache: PagedCache, prompt: Sequence[int]) -> tuple[int, Tensor]:
    """A new sequence and its last token's logits, float32 ``[1, vocab_size]``."""
    slot = cache.open()
    try:
        context = cache.context([len(prompt)], [slot])
        last = torch.tensor([len(prompt) - 1], device=model.device)
        return slot, model.forward(torch.tensor(list(prompt), device=model.device), context, last).float()
    except BaseException:
        cache.close(slot)
        raise


def _decode(model: Model, cache: PagedCache, tokens: list[int], slots: list[int]) -> Tensor:
    """Add a token to each sequence: float32 ``[sequences, vocab_size]``."""
    context = cache.context([1] * len(slots), slots)
    return model.forward(torch.tensor(tokens, device=model.device), context).float()
