"""A cache of fixed size for texts of any length: a rolling window of the newest tokens, with or without attention sinks.

Without sinks this is sliding-window attention (Mistral, Jiang et al. 2023, arXiv:2310.06825, section 2): a query sees the last
``window`` tokens, itself included, and what has left the window is overwritten. With sinks it is StreamingLLM
(Xiao et al. 2023, arXiv:2309.17453, section 3.2) for models that were trained on full attention: the first few tokens stay,
because attention that has nowhere to go goes there, and positions are those within the cache, so that no distance exceeds what
the model knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inference.attention import Attention, attend
from inference.config import ModelConfig
from inference.rope import Rope, rotate
from quantize.errors import InputError


class RollingCache:
    """Keys and values of one sequence's first ``sinks`` and last ``window`` tokens.

    Attributes:
        keys, values: ``[layers, kv_heads, sinks + window, head_dim]``; the rolling part is a ring.
        length: tokens seen so far.
    """

    def __init__(
        self,
        config: ModelConfig,
        rope: Rope,
        window: int | None = None,
        sinks: int = 0,
        max_tokens: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        attention: Attention = attend,
    ) -> None:
        """Allocate the window.

        Args:
            config: of the model.
            rope: the model's (:attr:`~inference.model.Model.rope`); its table is made to reach ``max_tokens``.
            window: tokens, sinks not counted; the config's sliding window by default.
            sinks: tokens of the beginning that stay; 4 is StreamingLLM's number.
            max_tokens: the longest text, which bounds the table of positions and nothing else; 2^15 by default.
            dtype: of keys and values.
            device: of keys and values.
            attention: for windows without sinks.

        Raises:
            InputError: no window, fewer than no sinks, or a rotary embedding in which more than distances count.
        """
        window = config.window if window is None else window
        if window is None or window < 1:
            raise InputError(
                f"window={window} keeps no token, and the config names no sliding_window; use 1 or more, such as 512"
            )
        if sinks < 0:
            raise InputError(f"sinks={sinks} is no number of tokens; use 0 (none) or more, such as 4")
        if sinks and not rope.relative:
            raise InputError("sinks need a rotary embedding in which only distances count; use another rope_type than dynamic")
        self.window, self.sinks, self.rope, self.attention = window, sinks, rope, attention
        self._max_tokens = max_tokens or 1 << 15
        rope.reserve(self._max_tokens)
        shape = (config.num_layers, config.num_kv_heads, sinks + window, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_tokens(self) -> int:
        """The longest text."""
        return self._max_tokens

    def nbytes(self) -> int:
        """Bytes of both buffers, whatever the length of the text."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def reset(self) -> None:
        """Forget the sequence."""
        self.length = 0

    def context(self, counts: Sequence[int], slots: Sequence[int] | None = None) -> RollingContext:
        """A forward that adds ``counts[0]`` tokens to the one sequence.

        Raises:
            InputError: more than one sequence, or a text beyond ``max_tokens``.
        """
        if len(counts) != 1 or list(slots or [0]) != [0]:
            raise InputError(f"a rolling cache holds one sequence, not {len(counts)}; use one cache for each, in slot 0")
        if self.length + counts[0] > self._max_tokens:
            raise InputError(
                f"window: {self.length} + {counts[0]} tokens are beyond max_tokens={self._max_tokens}; make it larger: "
                "it costs a table of positions and no cache"
            )
        return RollingContext(self, counts[0])

    def held(self) -> Tensor:
        """Positions of the tokens held, in order, int64; where they are is :meth:`places`."""
        device = self.keys.device
        sinks = torch.arange(min(self.sinks, self.length), device=device)
        first = min(max(self.sinks, self.length - self.window), self.length)
        return torch.cat((sinks, torch.arange(first, self.length, device=device)))

    def places(self, positions: Tensor) -> Tensor:
        """Where in the buffers tokens of ``positions`` are."""
        return torch.where(positions < self.sinks, positions, self.sinks + (positions - self.sinks) % self.window)


class RollingContext:
    """:class:`~inference.context.Context` of a :class:`RollingCache`."""

    def __init__(self, cache: RollingCache, count: int) -> None:
        self.counts: Sequence[int] = [count]
        device = cache.keys.device
        self.positions = torch.arange(cache.length, cache.length + count, device=device)
        self._cache = cache
        old = cache.held()
        self._old_places = cache.places(old)
        self._key_positions = torch.cat((old, self.positions))
        distance = self.positions[:, None] - self._key_positions
        inside = (distance >= 0) & (distance < cache.window)
        self._mask = inside | ((self._key_positions < cache.sinks) & (distance >= 0))
        # Of the new tokens those are written that the next forward may see; each place once.
        kept = (self.positions < cache.sinks) | (self.positions >= int(self.positions[-1]) + 1 - cache.window)
        self._kept = kept.nonzero()[:, 0]
        self._new_places = cache.places(self.positions[self._kept])
        # How far a query's sinks have moved up: as many as have left the window between them.
        gone = (self.positions + 1 - cache.sinks - cache.window).clamp_min(0)
        self._gone = gone if cache.sinks and bool(gone.any()) else None
        self._keys = self._values = torch.empty(0)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        cache, joined = self._cache, []
        for buffer, new in ((cache.keys[layer], keys), (cache.values[layer], values)):
            fresh = new.transpose(0, 1).to(buffer.dtype)
            joined.append(torch.cat((buffer[:, self._old_places], fresh), 1))
            buffer[:, self._new_places] = fresh[:, self._kept]
        self._keys, self._values = joined

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        if self._gone is None:
            return self._cache.attention(queries, self._keys, self._values, self._mask)
        return self._attend_with_sinks(queries, self._gone)

    def _attend_with_sinks(self, queries: Tensor, gone: Tensor) -> Tensor:
        """Sinks are nearer than their positions say by what is gone between, so queries are turned back by it for them."""
        cosine, sine = self._cache.rope.turns(gone)
        kv_heads, _, head_dim = self._keys.shape
        queries = queries * head_dim**-0.5
        nearer = rotate(queries, cosine, -sine)
        keys, values = self._keys.to(queries.dtype), self._values.to(queries.dtype)

        def scores(turned: Tensor) -> Tensor:
            grouped = turned.view(len(turned), kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [kv, shared, tokens, d]
            return torch.matmul(grouped, keys[:, None].transpose(2, 3))

        both = torch.where(self._key_positions < self._cache.sinks, scores(nearer), scores(queries))
        shares = torch.softmax(both.masked_fill(~self._mask, -torch.inf), -1)
        return torch.matmul(shares, values[:, None]).permute(2, 0, 1, 3).reshape(len(queries), -1)

    def advance(self) -> None:
        self._cache.length += self.counts[0]
