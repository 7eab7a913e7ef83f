"""The key/value cache: one contiguous buffer a sequence, allocated once, that prefill and decode write into in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inference.attention import Attention, attend, attend_each
from inference.config import ModelConfig
from inference.context import spans
from inference.native.attention import attend_slots, supports
from quantize.errors import InputError

CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_size(config: ModelConfig, max_tokens: int, slots: int) -> None:
    """Raise :class:`InputError` unless a cache may have this size."""
    if not 0 < max_tokens <= config.max_tokens:
        raise InputError(f"kv_cache: max_tokens={max_tokens} is outside the model's context; use 1 to {config.max_tokens}")
    if slots < 1:
        raise InputError(f"kv_cache: slots={slots} holds no sequence; use 1 or more")


def check_room(length: int, tokens: int, max_tokens: int) -> None:
    """Raise :class:`InputError` unless ``tokens`` more fit behind ``length``."""
    if length + tokens > max_tokens:
        raise InputError(
            f"kv_cache: {length} + {tokens} tokens do not fit into max_tokens={max_tokens}; "
            f"make it {length + tokens} or shorten the prompt"
        )


class KVCache:
    """Keys and values of one sequence in each slot.

    Attributes:
        keys, values: ``[layers, slots, kv_heads, max_tokens, head_dim]`` in the cache's type.
        lengths: tokens in each slot so far.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        slots: int = 1,
        attention: Attention = attend,
        native: bool = False,
    ) -> None:
        """Allocate room for ``max_tokens`` tokens in each of ``slots`` slots.

        ``native`` has several sequences with a token each attend in C++ (on the CPU, float32 or float16, with the default
        attention only; elsewhere it changes nothing).

        Raises:
            InputError: more tokens than the model's positions, no slot, or a type that is not float32, float16 or bfloat16.
        """
        check_size(config, max_tokens, slots)
        if dtype not in CACHE_DTYPES:
            raise InputError(f"kv_cache: dtype={dtype} is not supported; use {', '.join(map(str, CACHE_DTYPES))}")
        shape = (config.num_layers, slots, config.num_kv_heads, max_tokens, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * slots
        self.attention = attention
        self.native = native and supports(self.keys)

    @property
    def max_tokens(self) -> int:
        """Tokens there is room for in a slot."""
        return self.keys.shape[3]

    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def check_room(self, tokens: int, slot: int = 0) -> None:
        """Raise :class:`InputError` unless ``tokens`` more tokens fit into the slot."""
        check_room(self.lengths[slot], tokens, self.max_tokens)

    def context(self, counts: Sequence[int], slots: Sequence[int] | None = None) -> SlotContext:
        """A forward that adds ``counts[i]`` tokens to the sequence in ``slots[i]`` (0, 1, .. by default).

        Raises:
            InputError: a slot has no room for its tokens.
        """
        return SlotContext(self, counts, range(len(counts)) if slots is None else slots)

    def truncate(self, length: int, slot: int = 0) -> None:
        """Keep the first ``length`` tokens of a slot, at most those it has."""
        self.lengths[slot] = min(length, self.lengths[slot])

    def reset(self) -> None:
        """Forget all sequences; the buffers stay."""
        self.lengths = [0] * len(self.lengths)


class SlotPositions:
    """The part of a context that knows where tokens go: sequences in slots, each with a length.

    Attributes:
        positions, counts: as in :class:`~inference.context.Context`.
    """

    def __init__(self, lengths: list[int], counts: Sequence[int], slots: Sequence[int], device: torch.device) -> None:
        """``lengths``: of all slots; :meth:`advance` writes the new ones into it."""
        self.counts = counts
        self._lengths, self._slots = lengths, slots
        self._starts = [lengths[slot] for slot in slots]
        self._ends = [start + count for start, count in zip(self._starts, counts, strict=True)]
        ranges = [torch.arange(start, end, device=device) for start, end in zip(self._starts, self._ends, strict=True)]
        self.positions = ranges[0] if len(ranges) == 1 else torch.cat(ranges)
        self._places = list(zip(spans(counts), slots, self._starts, self._ends, strict=True))

    def places(self) -> list[tuple[slice, int, int, int]]:
        """Of each sequence: its packed rows, its slot, its length before and after."""
        return self._places

    def advance(self) -> None:
        for slot, end in zip(self._slots, self._ends, strict=True):
            self._lengths[slot] = end


class SlotContext(SlotPositions):
    """:class:`~inference.context.Context` over the slots of a :class:`KVCache`."""

    def __init__(self, cache: KVCache, counts: Sequence[int], slots: Sequence[int]) -> None:
        for count, slot in zip(counts, slots, strict=True):
            cache.check_room(count, slot)
        device = cache.keys.device
        super().__init__(cache.lengths, counts, slots, device)
        self._cache = cache
        # Several sequences with a token each are one batched product; other kernels than the default take them one by one.
        self._each = len(counts) > 1 and max(counts) == 1 and cache.attention is attend
        if self._each and cache.native:
            self._slot_index, self._end_index = torch.tensor(list(slots)), self.positions + 1
        elif self._each:
            self._slot_index = torch.tensor(list(slots), device=device)
            adjacent = list(slots) == list(range(slots[0], slots[0] + len(slots)))
            self._rows = slice(slots[0], slots[0] + len(slots)) if adjacent else self._slot_index
            self._bias: Tensor | None = None

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        all_keys, all_values = self._cache.keys[layer], self._cache.values[layer]
        if self._each:
            all_keys[self._slot_index, :, self.positions] = keys.to(all_keys.dtype)
            all_values[self._slot_index, :, self.positions] = values.to(all_values.dtype)
            return
        for span, slot, start, end in self._places:
            all_keys[slot, :, start:end].copy_(keys[span].transpose(0, 1))
            all_values[slot, :, start:end].copy_(values[span].transpose(0, 1))

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        if self._each and self._cache.native:
            return attend_slots(queries, keys, values, self._slot_index, self._end_index)
        if self._each:
            longest = max(self._ends)
            seen = keys[self._rows, :, :longest], values[self._rows, :, :longest]
            return attend_each(queries, *seen, self._end_bias(queries, longest))
        attention = self._cache.attention
        rows = [attention(queries[span], keys[slot, :, :end], values[slot, :, :end]) for span, slot, _, end in self._places]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _end_bias(self, queries: Tensor, longest: int) -> Tensor:
        if self._bias is None:
            behind = torch.arange(longest, device=queries.device) > self.positions[:, None]
            self._bias = torch.zeros(behind.shape, dtype=queries.dtype, device=queries.device)
            self._bias = self._bias.masked_fill_(behind, float("-inf"))[:, None, None]
        return self._bias
