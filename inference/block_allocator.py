"""Blocks of key/value memory by number: who holds them, which are free, and which free ones still hold something useful.

Reference counts are those of copy-on-write: a block belongs to every sequence whose table names it, and nobody writes to a
block that has a second holder. A free block keeps its contents until it is handed out again, so what a cache of prefixes knows
about (:mod:`inference.prefix`) is handed out last, the longest unused first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from quantize.errors import InputError


class BlockAllocator:
    """Reference counts of ``total`` blocks, and the queue of those nobody holds.

    Attributes:
        total: blocks there are.
        on_forget: called with a block whose remembered contents are about to be overwritten.
    """

    def __init__(self, total: int) -> None:
        """All blocks are free.

        Raises:
            InputError: fewer than one.
        """
        if total < 1:
            raise InputError(f"blocks={total} holds no token; use 1 or more")
        self.total = total
        self.on_forget: Callable[[int], None] | None = None
        self._references = [0] * total
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))  # first out first
        self._remembered: set[int] = set()

    @property
    def free(self) -> int:
        """Blocks nobody holds, remembered ones among them."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks somebody holds."""
        return self.total - len(self._free)

    def references(self, block: int) -> int:
        """How many hold it."""
        return self._references[block]

    def allocate(self) -> int:
        """A block for one holder, its contents undefined.

        Raises:
            InputError: none is free.
        """
        if not self._free:
            raise InputError(
                f"kv_cache: all blocks={self.total} are in use; make it {self.total + 1} or more, or end a sequence"
            )
        block, _ = self._free.popitem(last=False)
        self.forget(block)
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder, of a block in use or of a free one whose contents are remembered."""
        if self._references[block] == 0:
            if block not in self._remembered:
                raise ValueError(f"block {block} is free and its contents are forgotten: nothing to share")
            del self._free[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One holder less; the last one's block is free again."""
        if self._references[block] == 0:
            raise ValueError(f"block {block} is free already: released twice")
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free[block] = None
            self._free.move_to_end(block, last=block in self._remembered)

    def remember(self, block: int) -> None:
        """The contents of a block in use are worth keeping once it is free."""
        if self._references[block] == 0:
            raise ValueError(f"block {block} is free: its contents are nobody's")
        self._remembered.add(block)

    def forget(self, block: int) -> None:
        """The contents are about to change: whoever asked to remember them is told. Nothing happens to other blocks."""
        if block in self._remembered:
            self._remembered.remove(block)
            if self._references[block] == 0 and block in self._free:
                self._free.move_to_end(block, last=False)
            if self.on_forget is not None:
                self.on_forget(block)

    def check(self, holders: dict[int, int]) -> None:
        """Compare with the holders counted from outside, ``{block: tables that name it}``.

        Raises:
            ValueError: a block is leaked, freed while held, or counted wrongly.
        """
        for block in range(self.total):
            held, counted = holders.get(block, 0), self._references[block]
            if held != counted or (counted == 0) != (block in self._free):
                raise ValueError(f"block {block} is named by {held} tables, counted {counted}, free={block in self._free}")
