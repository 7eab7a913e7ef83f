"""The paged key/value cache of vLLM (Kwon et al. 2023, arXiv:2309.06180): memory in blocks, a table of them a sequence.

A contiguous cache reserves a sequence's greatest length when it begins. Here a block of ``block_size`` tokens is taken when
the first of them comes, from a pool that all sequences share, so what is lost is the unfilled end of each last block.
Sequences with a common beginning name the same blocks, and the one that writes to a shared block copies it first
(copy-on-write).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inference.attention import Attention, attend
from inference.block_allocator import BlockAllocator
from inference.config import ModelConfig
from inference.kv_cache import CACHE_DTYPES
from inference.native.attention import supports
from inference.paged_context import PagedContext
from quantize.errors import InputError


@dataclass
class BlockTable:
    """One sequence.

    Attributes:
        blocks: its blocks in order.
        length: tokens in them.
        hashes: of its first full blocks, as far as somebody asked (:mod:`inference.prefix`).
    """

    blocks: list[int] = field(default_factory=list)
    length: int = 0
    hashes: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Pages:
    """A sequence taken out of the pool: keys and values ``[layers, kv_heads, blocks, block_size, head_dim]``."""

    keys: Tensor
    values: Tensor
    length: int

    def nbytes(self) -> int:
        """Bytes of both."""
        return 2 * self.keys.numel() * self.keys.element_size()


class PagedCache:
    """Keys and values of any number of sequences in one pool of blocks.

    Attributes:
        keys, values: ``[layers, kv_heads, blocks, block_size, head_dim]`` in the cache's type. Heads come first, so that blocks
            gathered for one head are one matrix.
        block_size: tokens of a block.
        tables: by sequence number.
        allocator: of the pool's blocks.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        block_size: int = 8,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        attention: Attention = attend,
        native: bool = False,
    ) -> None:
        """Allocate the pool: room for ``blocks * block_size`` tokens.

        ``native`` has sequences that add a token each attend in C++ (on the CPU, float32 or float16, with the default
        attention only; elsewhere it changes nothing).

        Raises:
            InputError: no block, no token in a block, or a type that is not float32, float16 or bfloat16.
        """
        if block_size < 1:
            raise InputError(f"kv_cache: block_size={block_size} holds no token; use 1 or more, such as 8")
        if dtype not in CACHE_DTYPES:
            raise InputError(f"kv_cache: dtype={dtype} is not supported; use {', '.join(map(str, CACHE_DTYPES))}")
        self.allocator = BlockAllocator(blocks)
        shape = (config.num_layers, config.num_kv_heads, blocks, block_size, config.head_dim)
        # Zeros: what lies behind a sequence's end is multiplied by a weight of zero, so it must be finite from the start.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.block_size = block_size
        self.attention = attention
        self.native = native and supports(self.keys)
        self.tables: dict[int, BlockTable] = {}
        self.copies = 0
        self._longest = config.max_tokens
        self._next = 0

    @property
    def max_tokens(self) -> int:
        """The longest sequence: the pool's, or the model's context where that is shorter."""
        return min(self._longest, self.allocator.total * self.block_size)

    def nbytes(self) -> int:
        """Bytes of the pool."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` tokens fill."""
        return -(-tokens // self.block_size)

    def open(self, shared: Sequence[int] = ()) -> int:
        """A new sequence, whose first ``len(shared) * block_size`` tokens are in blocks that exist already; its number."""
        for block in shared:
            self.allocator.share(block)
        number = self._next
        self._next += 1
        self.tables[number] = BlockTable(list(shared), len(shared) * self.block_size)
        return number

    def fork(self, slot: int) -> int:
        """A second sequence with all that ``slot`` has, in the same blocks; its number."""
        number = self.open()
        table = self.tables[slot]
        for block in table.blocks:
            self.allocator.share(block)
        self.tables[number] = BlockTable(list(table.blocks), table.length, list(table.hashes))
        return number

    def close(self, slot: int) -> None:
        """End a sequence; blocks that no other one names are free. The last block first: beginnings are worth more."""
        for block in reversed(self.tables.pop(slot).blocks):
            self.allocator.release(block)

    def truncate(self, length: int, slot: int) -> None:
        """Keep the first ``length`` tokens of a sequence, at most those it has."""
        table = self.tables[slot]
        table.length = min(length, table.length)
        del table.hashes[table.length // self.block_size :]
        while len(table.blocks) > self.blocks_for(table.length):
            self.allocator.release(table.blocks.pop())

    def reset(self) -> None:
        """End all sequences and begin counting them at 0 again."""
        for slot in list(self.tables):
            self.close(slot)
        self._next = 0

    def blocks_needed(self, counts: Sequence[int], slots: Sequence[int]) -> int:
        """Free blocks that adding ``counts[i]`` tokens to sequence ``slots[i]`` takes, copies of shared ones included."""
        needed, leaving = 0, Counter[int]()
        for count, slot in zip(counts, slots, strict=True):
            table = self.tables[slot]
            needed += self.blocks_for(table.length + count) - len(table.blocks)
            if table.length % self.block_size:
                last = table.blocks[-1]
                # The last holder to write finds the others gone to copies of their own.
                if self.allocator.references(last) - leaving[last] > 1:
                    needed += 1
                    leaving[last] += 1
        return needed

    def context(self, counts: Sequence[int], slots: Sequence[int] | None = None) -> PagedContext:
        """A forward that adds ``counts[i]`` tokens to sequence ``slots[i]``; sequences 0, 1, .. by default, opened where new.

        Raises:
            InputError: too few free blocks, or more tokens than the model's positions; nothing has changed then.
        """
        if slots is None:
            slots = range(len(counts))
            while self._next < len(counts):
                self.open()
        for count, slot in zip(counts, slots, strict=True):
            if self.tables[slot].length + count > self._longest:
                raise InputError(
                    f"kv_cache: {self.tables[slot].length} + {count} tokens are outside the model's context; "
                    f"use at most {self._longest} of prompt and text together"
                )
        needed = self.blocks_needed(counts, slots)
        if needed > self.allocator.free:
            raise InputError(
                f"kv_cache: {needed} blocks of {self.block_size} tokens are needed and {self.allocator.free} of "
                f"blocks={self.allocator.total} are free; make it {self.allocator.used + needed} or end a sequence"
            )
        for count, slot in zip(counts, slots, strict=True):
            self._make_room(self.tables[slot], count)
        return PagedContext(self.keys, self.values, [self.tables[slot] for slot in slots], counts, self.attention, self.native)

    def _make_room(self, table: BlockTable, count: int) -> None:
        if table.length % self.block_size:
            last = table.blocks[-1]
            if self.allocator.references(last) > 1:
                table.blocks[-1] = self._copy(last)
            else:
                self.allocator.forget(last)  # truncated into the middle of a block: what follows is another text
        while len(table.blocks) < self.blocks_for(table.length + count):
            table.blocks.append(self.allocator.allocate())

    def _copy(self, block: int) -> int:
        copy = self.allocator.allocate()
        self.keys[:, :, copy] = self.keys[:, :, block]
        self.values[:, :, copy] = self.values[:, :, block]
        self.allocator.release(block)
        self.copies += 1
        return copy

    def take_out(self, slot: int) -> Pages:
        """End a sequence and keep what it has, in ordinary memory of the CPU."""
        table = self.tables[slot]
        index = torch.tensor(table.blocks, dtype=torch.int64, device=self.keys.device)
        pages = Pages(self.keys.index_select(2, index).cpu(), self.values.index_select(2, index).cpu(), table.length)
        self.close(slot)
        return pages

    def put_back(self, pages: Pages) -> int:
        """A new sequence with what :meth:`take_out` kept; its number.

        Raises:
            InputError: too few free blocks; nothing has changed then.
        """
        blocks = pages.keys.shape[2]
        if blocks > self.allocator.free:
            raise InputError(f"kv_cache: {blocks} blocks are needed and {self.allocator.free} are free; end a sequence")
        number = self.open()
        table = self.tables[number]
        table.blocks, table.length = [self.allocator.allocate() for _ in range(blocks)], pages.length
        index = torch.tensor(table.blocks, dtype=torch.int64, device=self.keys.device)
        self.keys.index_copy_(2, index, pages.keys.to(self.keys.device))
        self.values.index_copy_(2, index, pages.values.to(self.values.device))
        return number

    def holders(self) -> dict[int, int]:
        """How many tables name each block that any names."""
        return dict(Counter(block for table in self.tables.values() for block in table.blocks))

    def waste(self) -> float:
        """Internal fragmentation: the share of held token places that hold no token, 0 where nothing is held.

        A block of several sequences counts once, with the most that any of them has in it.
        """
        filled: dict[int, int] = {}
        for table in self.tables.values():
            for index, block in enumerate(table.blocks):
                tokens = min(self.block_size, table.length - index * self.block_size)
                filled[block] = max(tokens, filled.get(block, 0))
        return 1 - sum(filled.values()) / (len(filled) * self.block_size) if filled else 0.0
