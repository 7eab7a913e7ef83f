"""Pages against the contiguous cache; the pool, its tables and the cache of prefixes under any sequence of operations."""

from __future__ import annotations

from array import array
from pathlib import Path
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from inference.attention import attend
from inference.block_allocator import BlockAllocator
from inference.config import ModelConfig
from inference.context import Cache, last_rows
from inference.kv_cache import KVCache
from inference.load import load
from inference.paged import PagedCache, Pages
from inference.paged_context import buckets
from inference.prefix import PrefixCache
from quantize.errors import InputError

CONFIG = ModelConfig(
    num_layers=1,
    hidden_size=4,
    intermediate_size=4,
    vocab_size=5,
    head_dim=3,
    num_heads=1,
    num_kv_heads=1,
    norm_eps=1e-5,
    qk_norm=False,
    tied_head=True,
    rope={"rope_type": "default", "rope_theta": 10000.0},
    max_tokens=20,
    stop_tokens=(),
)


def entries(tokens: list[int]) -> torch.Tensor:
    """What a layer would store of each token, ``[tokens, 1, 3]``: it depends, as real keys do, on all tokens up to it."""
    marks = [crc32(array("q", tokens[: end + 1]).tobytes()) % 1_000_003 for end in range(len(tokens))]
    return torch.tensor(
        [[[float(token), float(index), float(mark)]] for index, (token, mark) in enumerate(zip(tokens, marks, strict=True))]
    )


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, grow, fork, shrink, leave and return; a plain list of tokens beside each says what must be stored."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedCache(CONFIG, blocks=9, block_size=3)
        self.prefix = PrefixCache(self.cache)
        self.texts: dict[int, list[int]] = {}
        self.outside: list[tuple[Pages, list[int]]] = []

    def grow(self, growth: dict[int, list[int]]) -> None:
        """One forward that adds tokens to several sequences, or changes nothing where there is no room."""
        slots, counts = list(growth), [len(tokens) for tokens in growth.values()]
        before = {slot: list(table.blocks) for slot, table in self.cache.tables.items()}
        needed, free = self.cache.blocks_needed(counts, slots), self.cache.allocator.free
        try:
            context = self.cache.context(counts, slots)
        except InputError:
            assert before == {slot: table.blocks for slot, table in self.cache.tables.items()}
            assert needed > free or any(
                len(self.texts[slot]) + count > CONFIG.max_tokens for slot, count in zip(slots, counts, strict=True)
            )
            return
        assert self.cache.allocator.free == free - needed
        new = torch.cat([entries(self.texts[slot] + growth[slot])[len(self.texts[slot]) :] for slot in slots])
        context.append(0, new, -new)
        context.advance()
        for slot in slots:
            self.texts[slot] += growth[slot]
            self.prefix.store(slot, self.texts[slot])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def arrive(self, tokens: list[int]) -> None:
        slot = self.prefix.open(tokens)
        found = self.cache.tables[slot].length
        assert found < len(tokens)
        self.texts[slot] = tokens[:found]
        self.grow({slot: tokens[found:]})

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.texts)), min_size=1, unique=True))
        self.grow({slot: data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=4)) for slot in slots})

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.texts)))
        self.texts[self.cache.fork(slot)] = list(self.texts[slot])

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), length=st.integers(0, 12))
    def shrink(self, data: st.DataObject, length: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.texts)))
        self.cache.truncate(length, slot)
        del self.texts[slot][length:]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.texts)))
        self.cache.close(slot)
        del self.texts[slot]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.texts)))
        self.outside.append((self.cache.take_out(slot), self.texts.pop(slot)))

    @precondition(lambda self: self.outside)
    @rule()
    def swap_in(self) -> None:
        pages, text = self.outside[-1]
        if pages.keys.shape[2] > self.cache.allocator.free:
            with pytest.raises(InputError, match="blocks are needed"):
                self.cache.put_back(pages)
            return
        self.outside.pop()
        self.texts[self.cache.put_back(pages)] = text

    @invariant()
    def no_block_is_leaked_or_freed_twice(self) -> None:
        self.cache.allocator.check(self.cache.holders())
        assert 0 <= self.cache.waste() < 1

    @invariant()
    def every_sequence_has_its_own_text(self) -> None:
        assert self.texts.keys() == self.cache.tables.keys()
        for slot, text in self.texts.items():
            table = self.cache.tables[slot]
            assert table.length == len(text)
            stored = self.cache.keys[0, 0, table.blocks].view(-1, 3)[: len(text)]
            assert torch.equal(stored, entries(text)[:, 0] if text else stored)
            assert torch.equal(self.cache.values[0, 0, table.blocks].view(-1, 3)[: len(text)], -stored)

    @invariant()
    def what_is_known_is_there(self) -> None:
        for block in self.prefix._hashes:
            assert self.prefix._blocks[self.prefix._hashes[block]] == block
        for text in list(self.texts.values())[:3]:
            found = self.prefix.lookup(text)
            stored = self.cache.keys[0, 0, found].view(-1, 3)
            assert torch.equal(stored, entries(text)[: len(stored), 0] if found else stored)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))


@torch.inference_mode()
def test_pages_give_the_contiguous_caches_logits(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    paged = PagedCache(model.config, 40, 4)
    caches: list[Cache] = [KVCache(model.config, 64, slots=4), paged]
    for _ in range(4):
        paged.open()
    generator = torch.Generator().manual_seed(0)
    # Prompts, a step of decode with lengths far apart, a prompt's second part beside steps of the others.
    for counts, slots in (([3, 31, 30, 1], [0, 1, 2, 3]), ([1, 1, 1, 1], [0, 1, 2, 3]), ([1, 1, 7], [3, 0, 1]), ([1], [2])):
        tokens = torch.randint(300, (sum(counts),), generator=generator)
        wanted, found = (model.forward(tokens, cache.context(counts, slots), last_rows(counts)) for cache in caches)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_another_kernel_and_type_of_cache(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    calls = []

    def counted(
        queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        calls.append(keys.shape[1])
        return attend(queries, keys, values, mask)

    exact, cache = KVCache(model.config, 16, slots=2), PagedCache(model.config, 8, 4, torch.float16, attention=counted)
    for counts in ([5, 3], [1, 1]):
        tokens = torch.arange(sum(counts))
        wanted, found = (model.forward(tokens, kept.context(counts)) for kept in (exact, cache))
        torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)
    assert calls == [5, 3] * 4 + [6, 4] * 4


@torch.inference_mode()
def test_a_fork_copies_the_block_it_writes_to_and_no_other(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    cache = PagedCache(model.config, 8, 4)
    first = cache.open()
    model.forward(torch.arange(6), cache.context([6], [first]))
    second = cache.fork(first)
    assert cache.allocator.used == 2
    logits = model.forward(torch.tensor([7, 8]), cache.context([1, 1], [first, second]))
    assert cache.copies == 1
    assert cache.tables[first].blocks[0] == cache.tables[second].blocks[0]
    assert cache.tables[first].blocks[1] != cache.tables[second].blocks[1]
    for token, row in ((7, logits[0]), (8, logits[1])):
        alone = model.forward(torch.tensor([*range(6), token]), KVCache(model.config, 8).context([7]), torch.tensor([6]))
        torch.testing.assert_close(row, alone[0], atol=1e-5, rtol=0)


def test_waste_is_the_unfilled_end_of_last_blocks() -> None:
    cache = PagedCache(CONFIG, 9, 3)
    assert cache.waste() == 0
    context = cache.context([4, 3])
    context.advance()
    assert cache.waste() == pytest.approx(2 / 9)
    cache.fork(0)  # the same blocks: nothing more is held
    assert cache.waste() == pytest.approx(2 / 9)


def test_a_shared_beginning_is_found_and_the_longest_unused_goes_first() -> None:
    cache = PagedCache(CONFIG, 4, 3)
    prefix = PrefixCache(cache)

    def run(tokens: list[int]) -> int:
        slot = prefix.open(tokens)
        found = cache.tables[slot].length
        cache.context([len(tokens) - found], [slot]).advance()
        prefix.store(slot, tokens)
        return found

    assert run([1] * 6) == 0
    assert run([1] * 6) == 3  # its last token is computed again: somebody wants the logits
    assert run([1] * 3 + [2]) == 3
    assert prefix.hits == 6 and prefix.asked == 16 and prefix.hit_rate == 6 / 16
    for slot in list(cache.tables):
        cache.close(slot)
    assert cache.allocator.free == 4 and len(prefix) == 2
    assert run([3] * 11) == 0  # takes all four blocks
    assert prefix.evictions == 2
    cache.close(3)
    assert run([1] * 6) == 0


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="blocks=0 holds no token"):
        BlockAllocator(0)
    with pytest.raises(InputError, match="block_size=0 holds no token"):
        PagedCache(CONFIG, 1, 0)
    with pytest.raises(InputError, match=r"dtype=torch\.int8 is not supported"):
        PagedCache(CONFIG, 1, 1, torch.int8)
    cache = PagedCache(CONFIG, 2, 4)
    with pytest.raises(InputError, match=r"3 blocks of 4 tokens are needed and 2 of blocks=2 are free; make it 3"):
        cache.context([9])
    with pytest.raises(InputError, match="0 \\+ 21 tokens are outside the model's context; use at most 20"):
        PagedCache(CONFIG, 9, 4).context([21])


def test_misuse_of_blocks_is_noticed() -> None:
    allocator = BlockAllocator(2)
    block = allocator.allocate()
    allocator.release(block)
    for misuse in (allocator.release, allocator.share, allocator.remember):
        with pytest.raises(ValueError, match=f"block {block} is free"):
            misuse(block)
    with pytest.raises(ValueError, match="block 0 is named by 1 tables, counted 0"):
        allocator.check({0: 1})
    allocator.allocate(), allocator.allocate()
    with pytest.raises(InputError, match="all blocks=2 are in use"):
        allocator.allocate()


def test_lengths_far_apart_go_into_separate_buckets() -> None:
    assert buckets([10, 100, 90, 9, 61]) == [[1, 2, 4], [0, 3]]
    assert buckets([]) == []
