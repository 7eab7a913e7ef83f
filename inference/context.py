"""The seam between a decoder's weights and its sequences: where tokens stand, and which keys they may look at.

A forward takes the new tokens of one or more sequences, packed one sequence after the other without padding. The model knows
weights and nothing of sequences, a :class:`Context` sequences and nothing of weights. Contiguous, rolling, 8-bit and paged
caches are different contexts of one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from inference.attention import Attention, attend


class Context(Protocol):
    """The sequences of one forward; made for it, and used up by it.

    Attributes:
        positions: int64 ``[total]``: where each packed token stands in its own sequence, counted from 0.
        counts: new tokens of each sequence, at least 1 each, ``sum(counts) == total``.
    """

    positions: Tensor
    counts: Sequence[int]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Take one layer's new keys, already rotated, and values: ``[total, kv_heads, head_dim]`` each."""

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """Each query over what its sequence has up to its own position; after :meth:`append` of the same layer.

        Args:
            layer: its index.
            queries: ``[total, heads, head_dim]``, rotated.

        Returns:
            ``[total, heads * head_dim]`` in the queries' type.
        """

    def advance(self) -> None:
        """All layers have been through: the new tokens are part of their sequences from here on."""


class Cache(Protocol):
    """Keys and values of one or more sequences, from which the context of each forward is made."""

    @property
    def max_tokens(self) -> int:
        """The longest sequence."""

    def context(self, counts: Sequence[int], slots: Sequence[int] | None = None) -> Context:
        """For a forward that adds ``counts[i]`` tokens to sequence ``slots[i]`` (0, 1, .. by default).

        Raises:
            InputError: there is no room for them.
        """

    def reset(self) -> None:
        """Forget all sequences."""

    def nbytes(self) -> int:
        """Bytes of everything it holds."""


def spans(counts: Sequence[int]) -> list[slice]:
    """Rows of each sequence in the packed batch."""
    ends = list(accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def last_rows(counts: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Row of each sequence's last token, int64 ``[sequences]``: where the next token's logits come from."""
    return torch.tensor(list(accumulate(counts)), device=device) - 1


class Uncached:
    """A context without a past: every sequence is given whole, and forgotten after the forward.

    What generation costs without a cache, and how a text is scored that needs no continuation.
    """

    def __init__(self, counts: Sequence[int], device: torch.device | None = None, attention: Attention = attend) -> None:
        """``counts``: length of each sequence, at least 1."""
        self.counts = counts
        self.positions = torch.cat([torch.arange(count, device=device) for count in counts])
        self._spans = spans(counts)
        self._attention = attention
        self._keys = self._values = torch.empty(0)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys.transpose(0, 1), values.transpose(0, 1)

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        rows = [self._attention(queries[span], self._keys[:, span], self._values[:, span]) for span in self._spans]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def advance(self) -> None:
        pass
