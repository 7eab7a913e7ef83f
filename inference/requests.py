"""What is asked of a server of many texts, what it keeps of each while it works on it, and what it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from inference.config import ModelConfig
from inference.paged import Pages
from inference.sampling import Sampler, Sampling
from quantize.errors import InputError

OnToken = Callable[[int, int, str | None], None]


@dataclass(frozen=True)
class Request:
    """One text to be continued.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: the most to generate, at least 1.
        sampling: how tokens are chosen; random numbers are the request's own.
        stop: ids to stop at; those of the model's config by default, ``()`` for none.
        priority: 0 for the ordinary, more for what may wait (see :class:`~inference.scheduler.Scheduler`).
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[int] | None = None
    priority: int = 0

    def check(self, config: ModelConfig, room: int) -> None:
        """Raise :class:`InputError` unless the model can run it in a cache with ``room`` for one sequence's tokens."""
        if not self.prompt:
            raise InputError("request: the prompt has no tokens; give at least one, such as the tokenizer's bos_token_id")
        wrong = next((token for token in self.prompt if not 0 <= token < config.vocab_size), None)
        if wrong is not None:
            raise InputError(f"request: token id {wrong} is outside the vocabulary; use 0 to {config.vocab_size - 1}")
        if self.max_new_tokens < 1:
            raise InputError(f"request: max_new_tokens={self.max_new_tokens} asks for nothing; use 1 or more")
        if self.priority < 0:
            raise InputError(f"request: priority={self.priority} goes before the ordinary; use 0 (ordinary) or more (may wait)")
        # The last token is not fed back, so it needs no room.
        if len(self.prompt) + self.max_new_tokens - 1 > room:
            raise InputError(
                f"request: max_new_tokens={self.max_new_tokens} after a prompt of {len(self.prompt)} does not fit into a cache "
                f"of {room} tokens; use at most {max(0, room - len(self.prompt) + 1)}"
            )


@dataclass(frozen=True)
class Result:
    """What became of a request.

    Attributes:
        tokens: generated; a stop token is the last.
        reason: ``stop``, ``length``, ``cancelled``, or ``callback`` where ``error`` is what its callback raised.
        cached: prompt tokens that were found in the cache of prefixes when it first ran.
        preemptions: how often it was taken out of the cache for others.
        ttft, tpot: seconds from its arrival to its first token, and from then on a token; nan where there is none.
    """

    tokens: tuple[int, ...]
    reason: str
    error: Exception | None
    cached: int
    preemptions: int
    ttft: float
    tpot: float


class Work:
    """A request on its way: waiting where ``slot`` is None, else with a sequence in the cache.

    Attributes:
        number: in order of arrival.
        order: what it is sorted by; the smaller goes first.
        tokens: prompt and text so far.
        slot: of its sequence in the cache.
        pages: its keys and values where they were swapped out.
        reason: why it has ended, None before.
    """

    def __init__(self, number: int, order: int, request: Request, config: ModelConfig, on_token: OnToken | None = None) -> None:
        self.number, self.order, self.request = number, order, request
        self.tokens = list(request.prompt)
        self.slot: int | None = None
        self.pages: Pages | None = None
        self.reason: str | None = None
        self.error: Exception | None = None
        self.cached: int | None = None
        self.preemptions = 0
        self._on_token = on_token
        self._stop = config.stop_tokens if request.stop is None else tuple(request.stop)
        self._sampler = Sampler(request.sampling, request.prompt)
        self._arrived = time.perf_counter()
        self._first = self._last = float("nan")

    @property
    def key(self) -> tuple[int, int]:
        """Sorts requests: who goes first comes first."""
        return self.order, self.number

    @property
    def made(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is all it wants to know of the logits."""
        return not self.request.sampling.changes_logits

    def choose(self, logits: Tensor) -> int:
        """The next token, from float32 ``[vocab_size]``."""
        return self._sampler.choose(logits)

    def take(self, token: int) -> None:
        """Add a token to the text, find out whether it was the last, and hand it on."""
        self.tokens.append(token)
        self._last = time.perf_counter()
        if self.made == 1:
            self._first = self._last
        if token in self._stop:
            self.reason = "stop"
        elif self.made == self.request.max_new_tokens:
            self.reason = "length"
        if self._on_token is None:
            return
        try:
            self._on_token(self.number, token, self.reason)
        except Exception as error:  # the others must go on; the caller finds it in the result
            self.reason, self.error = "callback", error

    def result(self) -> Result:
        """The answer, once ``reason`` is there."""
        assert self.reason is not None
        made = self.made
        tpot = (self._last - self._first) / (made - 1) if made > 1 else float("nan")
        text = tuple(self.tokens[len(self.request.prompt) :])
        cached = self.cached or 0
        return Result(text, self.reason, self.error, cached, self.preemptions, self._first - self._arrived, tpot)
