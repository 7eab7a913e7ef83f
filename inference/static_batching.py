"""Static batching: requests in batches that begin and end together, padded to the longest. What continuous batching replaces.

It is written as it is commonly done, padding computed and all, so that the comparison is with the real thing: prompts are
padded to the longest prompt of the batch, and whoever is finished keeps its row until the last one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inference.kv_cache import KVCache
from inference.model import Model
from inference.requests import Request, Result, Work


@dataclass
class Padding:
    """What padding costs.

    Attributes:
        computed_tokens: rows that went through the model.
        useful_tokens: those of them that a request needed.
        reserved_tokens: token places of the caches, at the batches' beginnings.
        filled_tokens: those of them that a request had filled at the batches' ends.
    """

    computed_tokens: int = 0
    useful_tokens: int = 0
    reserved_tokens: int = 0
    filled_tokens: int = 0

    @property
    def computed_waste(self) -> float:
        """Share of the computed tokens nobody needed."""
        return 1 - self.useful_tokens / self.computed_tokens if self.computed_tokens else 0.0

    @property
    def cache_waste(self) -> float:
        """Share of the cache that stayed empty to the end."""
        return 1 - self.filled_tokens / self.reserved_tokens if self.reserved_tokens else 0.0


class StaticBatching:
    """Runs requests batch by batch, in the order given.

    Attributes:
        padding: what it has cost so far.
    """

    def __init__(self, model: Model, batch: int, cache_dtype: torch.dtype | None = None) -> None:
        """``batch`` requests at a time, at least one."""
        self.padding = Padding()
        self._model, self._batch, self._dtype = model, batch, cache_dtype or model.dtype

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> list[Result]:
        """The results in order.

        Raises:
            InputError: a request does not fit into the model's context, or a batch's longest prompt and longest text do not.
        """
        for request in requests:
            request.check(self._model.config, self._model.config.max_tokens)
        works = [Work(number, 0, request, self._model.config) for number, request in enumerate(requests)]
        for start in range(0, len(works), self._batch):
            self._run(works[start : start + self._batch])
        return [work.result() for work in works]

    def _run(self, works: list[Work]) -> None:
        prompts = [list(work.request.prompt) for work in works]
        longest = max(map(len, prompts))
        room = longest + max(work.request.max_new_tokens for work in works) - 1
        cache = KVCache(self._model.config, room, self._dtype, self._model.device, len(works), native=self._model.native)
        # Padding behind a prompt is seen by no token of it, so forgetting it afterwards is all the masking that is needed.
        padded = [token for prompt in prompts for token in prompt + [0] * (longest - len(prompt))]
        last = [index * longest + len(prompt) - 1 for index, prompt in enumerate(prompts)]
        self._step(works, padded, cache, longest, last)
        for slot, prompt in enumerate(prompts):
            cache.truncate(len(prompt), slot)
        while any(work.reason is None for work in works):
            tokens = [work.tokens[-1] for work in works]
            self._step(works, tokens, cache, 1, list(range(len(works))))
        self.padding.reserved_tokens += room * len(works)
        self.padding.filled_tokens += sum(len(work.tokens) - 1 for work in works)

    def _step(self, works: list[Work], tokens: list[int], cache: KVCache, count: int, last: list[int]) -> None:
        device = self._model.device
        context = cache.context([count] * len(works))
        logits = self._model.forward(torch.tensor(tokens, device=device), context, torch.tensor(last, device=device)).float()
        likeliest = logits.argmax(-1).tolist()
        self.padding.computed_tokens += len(tokens)
        for row, work in enumerate(works):
            if work.reason is None:
                self.padding.useful_tokens += len(work.tokens) if count > 1 else 1
                work.take(likeliest[row] if work.greedy else work.choose(logits[row]))
