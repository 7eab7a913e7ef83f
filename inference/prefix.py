"""Prefix caching: prompts that begin alike share the keys and values of their beginning, also after the first has ended.

A full block is known by the hash of its tokens and of all blocks before it, as in vLLM and SGLang's radix tree (Zheng et al.
2023, arXiv:2312.07104), so finding the longest stored beginning is one look-up a block. What nobody holds stays until its
block is needed for something else, the longest unused first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from inference.paged import PagedCache


class PrefixCache:
    """Which blocks of a pool hold which beginnings.

    Attributes:
        asked: tokens of all prompts looked up.
        hits: those of them that were found.
        evictions: blocks whose contents gave way to others.
    """

    def __init__(self, cache: PagedCache) -> None:
        """Watch ``cache``'s blocks; a pool has one such watcher."""
        self.asked = self.hits = self.evictions = 0
        self._cache = cache
        self._blocks: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}
        cache.allocator.on_forget = self._forget

    @property
    def hit_rate(self) -> float:
        """Share of the tokens asked for that were there, 0 before the first question."""
        return self.hits / self.asked if self.asked else 0.0

    def __len__(self) -> int:
        """Blocks known by their contents."""
        return len(self._blocks)

    def lookup(self, tokens: Sequence[int]) -> list[int]:
        """Blocks of the longest stored beginning of ``tokens``; at least one token is left over, whose logits are wanted."""
        found: list[int] = []
        size, parent = self._cache.block_size, b""
        for start in range(0, len(tokens) - size, size):
            parent = _hash(parent, tokens[start : start + size])
            block = self._blocks.get(parent)
            if block is None:
                break
            found.append(block)
        return found

    def open(self, tokens: Sequence[int]) -> int:
        """A new sequence that begins with what is stored of ``tokens``; its number. Its table says how many tokens that is."""
        found = self.lookup(tokens)
        self.asked += len(tokens)
        self.hits += len(found) * self._cache.block_size
        slot = self._cache.open(found)
        self._cache.tables[slot].hashes = [self._hashes[block] for block in found]
        return slot

    def store(self, slot: int, tokens: Sequence[int]) -> None:
        """Make known the blocks that a forward has filled; ``tokens`` are the sequence's, from its first on."""
        table, size = self._cache.tables[slot], self._cache.block_size
        chain = table.hashes
        for index in range(len(chain), table.length // size):
            block = table.blocks[index]
            chain.append(_hash(chain[-1] if chain else b"", tokens[index * size : (index + 1) * size]))
            # Two sequences may have computed the same block side by side: the first is kept.
            if chain[-1] not in self._blocks and block not in self._hashes:
                self._blocks[chain[-1]], self._hashes[block] = block, chain[-1]
                self._cache.allocator.remember(block)

    def _forget(self, block: int) -> None:
        del self._blocks[self._hashes.pop(block)]
        self.evictions += 1


def _hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """128 bits, so that two texts with one hash need not be thought of."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()
