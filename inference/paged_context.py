"""Attention over pages: the :class:`~inference.context.Context` of a forward whose keys and values lie in blocks.

Sequences that add one token each, which is decode, are computed together: their blocks are gathered into one buffer, padded to
the longest. Sequences of very different lengths go into separate buffers, so the padding stays small. A sequence that adds
several tokens, which is a prompt or a part of one, has its blocks gathered alone. In C++ (``native``) each sequence that adds
one token reads its own blocks, and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from inference.attention import Attention, attend
from inference.context import spans
from inference.native.attention import attend_pages

_FULL_ENOUGH = 0.6  # a sequence shorter than this share of its buffer's longest starts a buffer of its own


class Table(Protocol):
    """What is needed of a sequence: blocks for all its tokens, old and new, and the number of old ones."""

    blocks: list[int]
    length: int


@dataclass(frozen=True)
class _Bucket:
    """Sequences of one token each that are computed together.

    Attributes:
        rows: their tokens among the packed ones, int64 ``[n]``.
        blocks: int64 ``[n * longest]``, shorter tables filled up with their own first block.
        bias: ``[n, 1, longest * block_size]``: 0 where a sequence has a key, ``-inf`` behind its end.
    """

    rows: Tensor
    blocks: Tensor
    bias: Tensor


def buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of ``lengths``, the longest first, split where one is much shorter than the first of its bucket."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if found and lengths[index] >= _FULL_ENOUGH * lengths[found[-1][0]]:
            found[-1].append(index)
        else:
            found.append([index])
    return found


class PagedContext:
    """One forward over a pool of blocks; see :class:`~inference.paged.PagedCache`."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        tables: Sequence[Table],
        counts: Sequence[int],
        attention: Attention,
        native: bool = False,
    ) -> None:
        """``keys``, ``values`` ``[layers, kv_heads, blocks, block_size, head_dim]``; tables have blocks for new tokens."""
        self.counts = counts
        self._keys, self._values, self._tables, self._attention = keys, values, tables, attention
        self._block_size = size = keys.shape[3]
        self._ends = [table.length + count for table, count in zip(tables, counts, strict=True)]
        positions = [position for table, end in zip(tables, self._ends, strict=True) for position in range(table.length, end)]
        places = [
            table.blocks[position // size] * size + position % size
            for table, end in zip(tables, self._ends, strict=True)
            for position in range(table.length, end)
        ]
        self._device = keys.device
        self.positions = torch.tensor(positions, device=self._device)
        self._places = torch.tensor(places, device=self._device)
        self._spans = spans(counts)
        ones = [index for index, count in enumerate(counts) if count == 1]
        # Other kernels than the default take sequences one by one.
        together = ones if len(ones) > 1 and attention is attend else []
        self._native = self._tables_of(together) if native and together else None
        padded = [] if self._native else together
        self._buckets = [
            self._bucket([padded[index] for index in bucket]) for bucket in buckets([self._ends[one] for one in padded])
        ]
        alone = [index for index in range(len(counts)) if index not in set(together)]
        self._alone = [(self._spans[index], self._index(tables[index].blocks), self._ends[index]) for index in alone]

    def _index(self, blocks: list[int]) -> Tensor:
        return torch.tensor(blocks, device=self._device)

    def _tables_of(self, members: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of these sequences' tokens, their block tables filled up to the longest, and their ends."""
        blocks = self._index(self._filled(members)).view(len(members), -1)
        return self._rows_of(members), blocks, self._ends_of(members)

    def _filled(self, members: list[int]) -> list[int]:
        """Their tables one after the other, shorter ones filled up with their own first block."""
        tables = [self._tables[member].blocks for member in members]
        width = max(map(len, tables))
        return [block for table in tables for block in table + table[:1] * (width - len(table))]

    def _rows_of(self, members: list[int]) -> Tensor:
        return self._index([self._spans[member].start for member in members])

    def _ends_of(self, members: list[int]) -> Tensor:
        return self._index([self._ends[member] for member in members])

    def _bucket(self, members: list[int]) -> _Bucket:
        blocks = self._filled(members)
        width = len(blocks) // len(members)
        behind = torch.arange(width * self._block_size, device=self._device) >= self._ends_of(members)[:, None]
        bias = torch.zeros(behind.shape, device=self._device).masked_fill_(behind, float("-inf"))[:, None]
        return _Bucket(self._rows_of(members), self._index(blocks), bias)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        for pool, new in ((self._keys[layer], keys), (self._values[layer], values)):
            flat = pool.view(pool.shape[0], -1, pool.shape[3])
            flat.index_copy_(1, self._places, new.transpose(0, 1).to(pool.dtype))

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        keys, values = self._keys[layer], self._values[layer]
        if len(self._alone) == 1 and not self._buckets and not self._native:
            return self._attend_alone(queries, keys, values, *self._alone[0])
        out = queries.new_empty(len(queries), queries.shape[1] * queries.shape[2])
        if self._native:
            rows, tables, ends = self._native
            out[rows] = attend_pages(queries[rows], keys, values, tables, ends)
        for bucket in self._buckets:
            out[bucket.rows] = self._attend_bucket(queries[bucket.rows], keys, values, bucket)
        for span, blocks, end in self._alone:
            out[span] = self._attend_alone(queries, keys, values, span, blocks, end)
        return out

    def _attend_alone(self, queries: Tensor, keys: Tensor, values: Tensor, span: slice, blocks: Tensor, end: int) -> Tensor:
        seen = [pool.index_select(1, blocks).view(pool.shape[0], -1, pool.shape[3])[:, :end] for pool in (keys, values)]
        return self._attention(queries[span], seen[0], seen[1])

    @staticmethod
    def _attend_bucket(queries: Tensor, keys: Tensor, values: Tensor, bucket: _Bucket) -> Tensor:
        kv_heads, _, _, head_dim = keys.shape
        sequences = len(queries)
        # [kv_heads, sequences, length, head_dim]: a gathered block is one copy of block_size * head_dim numbers.
        seen = [
            pool.index_select(1, bucket.blocks).view(kv_heads, sequences, -1, head_dim).to(queries.dtype)
            for pool in (keys, values)
        ]
        grouped = queries.view(sequences, kv_heads, -1, head_dim).transpose(0, 1) * head_dim**-0.5
        scores = torch.matmul(grouped, seen[0].transpose(2, 3)).add_(bucket.bias.to(queries.dtype))
        return torch.matmul(torch.softmax(scores, -1), seen[1]).transpose(0, 1).reshape(sequences, -1)

    def advance(self) -> None:
        for table, end in zip(self._tables, self._ends, strict=True):
            table.length = end
