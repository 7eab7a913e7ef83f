"""Keys and values in 8 bits: a code each, and a float16 scale for each head of each token.

Symmetric, ``scale = max|x| / 127`` rounded to float16 before the codes are, so reading gives what writing meant. A head of 64
takes 66 bytes where float16 takes 128. The new token's own keys are rounded too, so all queries see the same.

Keys have channels that are large in every token and would make the scale too coarse for the others. They are stored multiplied
by a Hadamard matrix, which spreads a large channel over all, and queries are multiplied by the same one: it is orthogonal, so
products are what they were (Ashkboos et al. 2024, QuaRot, arXiv:2404.00456, section 4). Values have no such channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inference.attention import Attention, attend
from inference.config import ModelConfig
from inference.kv_cache import SlotPositions, check_room, check_size

_SMALLEST = 2.0**-24  # the least float16 above zero: a head of zeros needs a scale too


class Int8KVCache:
    """:class:`~inference.kv_cache.KVCache` in 8 bits.

    Attributes:
        codes: int8 ``[2, layers, slots, kv_heads, max_tokens, head_dim]``, keys first.
        scales: float16, the same without ``head_dim``.
        lengths: tokens in each slot so far.
        spread: float32 ``[head_dim, head_dim]``, orthogonal: what keys and queries are multiplied by.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_tokens: int,
        device: torch.device | None = None,
        slots: int = 1,
        attention: Attention = attend,
    ) -> None:
        """As :class:`~inference.kv_cache.KVCache`.

        Raises:
            InputError: more tokens than the model's positions, or no slot.
        """
        check_size(config, max_tokens, slots)
        shape = (2, config.num_layers, slots, config.num_kv_heads, max_tokens)
        self.codes = torch.zeros((*shape, config.head_dim), dtype=torch.int8, device=device)
        self.scales = torch.zeros(shape, dtype=torch.float16, device=device)
        self.lengths = [0] * slots
        self.attention = attention
        self.spread = hadamard(config.head_dim).to(device)

    @property
    def max_tokens(self) -> int:
        """Tokens there is room for in a slot."""
        return self.codes.shape[4]

    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.numel() + 2 * self.scales.numel()

    def context(self, counts: Sequence[int], slots: Sequence[int] | None = None) -> Int8Context:
        """A forward that adds ``counts[i]`` tokens to the sequence in ``slots[i]`` (0, 1, .. by default).

        Raises:
            InputError: a slot has no room for its tokens.
        """
        slots = range(len(counts)) if slots is None else slots
        for count, slot in zip(counts, slots, strict=True):
            check_room(self.lengths[slot], count, self.max_tokens)
        return Int8Context(self, counts, slots)

    def truncate(self, length: int, slot: int = 0) -> None:
        """Keep the first ``length`` tokens of a slot, at most those it has."""
        self.lengths[slot] = min(length, self.lengths[slot])

    def reset(self) -> None:
        """Forget all sequences."""
        self.lengths = [0] * len(self.lengths)


def hadamard(size: int) -> Tensor:
    """An orthogonal float32 ``[size, size]``: Sylvester's signs, in blocks of the largest power of two that divides."""
    block = torch.ones(1, 1)
    while size % (2 * len(block)) == 0:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    return torch.kron(torch.eye(size // len(block)), block / len(block) ** 0.5)


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of floating ``[..., head_dim]`` and float16 scales ``[...]``."""
    wide = x.float()
    scales = wide.abs().amax(-1).div(127).clamp_min(_SMALLEST).half()
    return wide.div(scales.float()[..., None]).round_().clamp_(-127, 127).to(torch.int8), scales


class Int8Context(SlotPositions):
    """:class:`~inference.context.Context` over the slots of an :class:`Int8KVCache`."""

    def __init__(self, cache: Int8KVCache, counts: Sequence[int], slots: Sequence[int]) -> None:
        super().__init__(cache.lengths, counts, slots, cache.codes.device)
        self._cache = cache

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        for part, new in enumerate((keys.float() @ self._cache.spread, values)):
            codes, scales = quantize_heads(new.transpose(0, 1))
            for span, slot, start, end in self.places():
                self._cache.codes[part, layer, slot, :, start:end] = codes[:, span]
                self._cache.scales[part, layer, slot, :, start:end] = scales[:, span]

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        rows, queries = [], queries @ self._cache.spread.to(queries.dtype)
        for span, slot, _, end in self.places():
            codes = self._cache.codes[:, layer, slot, :, :end].to(queries.dtype)
            keys, values = codes.mul_(self._cache.scales[:, layer, slot, :, :end, None].to(queries.dtype))
            rows.append(self._cache.attention(queries[span], keys, values))
        return rows[0] if len(rows) == 1 else torch.cat(rows)
