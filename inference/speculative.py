"""Speculative decoding: several tokens guessed cheaply and checked in one forward (Leviathan et al. 2023, arXiv:2211.17192).

A forward of a few tokens reads the weights once, as that of a single one does. The text is exactly the one without guessing,
sampled or greedy: each position's token is chosen from the model's own logits, in order and with the same random numbers, and
guesses count only up to the first that is not the token chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from inference.kv_cache import KVCache
from inference.model import Model
from inference.native.step import NativeStep
from inference.sampling import Sampler, Sampling, likeliest
from quantize.errors import InputError


class Drafter(Protocol):
    """Whoever guesses."""

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """At most ``count`` tokens that may follow ``tokens``; none where it has no idea."""


class PromptLookup:
    """Guesses what followed the last time the text was like this: free, and good where texts repeat (code, quotes, summaries).

    Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self, longest: int = 3) -> None:
        """Look for the last ``longest`` tokens, then for fewer.

        Raises:
            InputError: fewer than one.
        """
        if longest < 1:
            raise InputError(f"prompt lookup: longest={longest} tokens are found everywhere; use 1 or more, such as 3")
        self._longest = longest
        self._text: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        if self._text != list(tokens[: len(self._text)]):
            self._text, self._after = [], [{} for _ in range(self._longest)]
        # Where each run of tokens was last followed by something; the newest run is followed by nothing yet.
        for end in range(max(1, len(self._text)), len(tokens)):
            for size in range(1, min(self._longest, end) + 1):
                self._after[size - 1][tuple(tokens[end - size : end])] = end
        self._text = list(tokens)
        for size in range(min(self._longest, len(tokens)), 0, -1):
            place = self._after[size - 1].get(tuple(tokens[-size:]))
            if place is not None:
                return list(tokens[place : place + count])
        return []


class DraftModel:
    """Guesses by a smaller or more coarsely quantized model of the same vocabulary, greedily."""

    def __init__(self, model: Model, max_tokens: int | None = None) -> None:
        """``max_tokens`` of its cache, the model's context by default; one loaded with ``native=True`` guesses natively."""
        self.model = model
        self._cache = KVCache(model.config, max_tokens or model.config.max_tokens, model.dtype, model.device)
        self._step = NativeStep(model, self._cache) if model.native else None
        self._held: list[int] = []

    @torch.inference_mode()
    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        count = min(count, self._cache.max_tokens - len(tokens))
        if count < 1:
            return []
        # Guesses that were accepted are in the cache already; the last token is run again for its logits.
        same = next((i for i, (held, token) in enumerate(zip(self._held, tokens, strict=False)) if held != token), None)
        kept = min(len(self._held) if same is None else same, len(tokens) - 1)
        self._cache.truncate(kept)
        guesses: list[int] = []
        new = list(tokens[kept:])
        for _ in range(count):
            new = [likeliest(self._logits(new))]
            guesses += new
        self._held = [*tokens, *guesses[:-1]]
        return guesses

    def _logits(self, new: list[int]) -> Tensor:
        if self._step is not None and len(new) == 1:
            return self._step(new[0])
        last = torch.tensor([len(new) - 1], device=self.model.device)
        context = self._cache.context([len(new)])
        return self.model.forward(torch.tensor(new, device=self.model.device), context, last)[0]


@dataclass
class Acceptance:
    """What guessing brought: ``proposed`` and ``accepted`` guesses, ``forwards`` of the model, ``made`` tokens."""

    proposed: int = 0
    accepted: int = 0
    forwards: int = 0
    made: int = 0

    @property
    def rate(self) -> float:
        """Share of the guesses that were right, 0 before the first."""
        return self.accepted / self.proposed if self.proposed else 0.0


class Speculator:
    """A model that checks guesses.

    Attributes:
        acceptance: counted over all texts.
    """

    def __init__(self, model: Model, drafter: Drafter, lookahead: int = 4, max_tokens: int | None = None) -> None:
        """Check at most ``lookahead`` guesses at a time; ``max_tokens`` of the cache, the model's context by default.

        Raises:
            InputError: no guess at a time, or a draft model of another vocabulary.
        """
        if lookahead < 1:
            raise InputError(f"speculative: lookahead={lookahead} guesses nothing; use 1 or more, such as 4")
        if isinstance(drafter, DraftModel) and drafter.model.config.vocab_size != model.config.vocab_size:
            raise InputError(
                f"speculative: the draft's vocab_size={drafter.model.config.vocab_size} is not the model's "
                f"{model.config.vocab_size}; use a variant of the same model"
            )
        self.acceptance = Acceptance()
        self._model, self._drafter, self._lookahead = model, drafter, lookahead
        self._cache = KVCache(model.config, max_tokens or model.config.max_tokens, model.dtype, model.device)

    @torch.inference_mode()
    def generate(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling | None = None, stop: Sequence[int] | None = None
    ) -> Iterator[int]:
        """Yield what :func:`inference.generate.generate` yields for the same arguments.

        Raises:
            InputError: no prompt, or prompt and text do not fit into the cache.
        """
        if not prompt or len(prompt) + max_new_tokens - 1 > self._cache.max_tokens:
            raise InputError(
                f"speculative: a prompt of {len(prompt)} and max_new_tokens={max_new_tokens} do not fit into max_tokens="
                f"{self._cache.max_tokens}; use at least one token and at most that many"
            )
        if max_new_tokens < 1:
            return
        sampling = sampling or Sampling()
        stop = self._model.config.stop_tokens if stop is None else stop
        sampler = Sampler(sampling, prompt)
        self._cache.reset()
        tokens, new = list(prompt), list(prompt)
        made = 0
        while True:
            room = max_new_tokens - made - 1
            guesses = self._drafter.propose(tokens, min(self._lookahead, room)) if made and room else []
            accepted = self._check(new, guesses, sampler)
            self._cache.truncate(len(tokens) + len(accepted) - 1)
            for token in accepted:
                tokens.append(token)
                made += 1
                self.acceptance.made += 1
                yield token
                if token in stop or made == max_new_tokens:
                    return
            new = accepted[-1:]

    def _check(self, new: list[int], guesses: list[int], sampler: Sampler) -> list[int]:
        """The model's own tokens after ``new``, as many as the guesses allow to know: at least one."""
        device, rows = self._model.device, len(guesses) + 1
        last = torch.arange(len(new) - 1, len(new) + len(guesses), device=device)
        context = self._cache.context([len(new) + len(guesses)])
        logits = self._model.forward(torch.tensor([*new, *guesses], device=device), context, last).float()
        self.acceptance.forwards += 1
        self.acceptance.proposed += len(guesses)
        found: list[int] = []
        for row in range(rows):
            found.append(sampler.choose(logits[row]))
            if row < len(guesses) and found[row] != guesses[row]:
                break
        self.acceptance.accepted += len(found) - 1
        return found
