"""The decode step, compiled by torch.compile: static shapes, bucketed lengths, one graph for all blocks of a kind.

At one token a block is some 90 small operations, views counted, and each costs more in Python and dispatch than it computes.
Compiled, those between two products are a few loops. What is compiled is one block and not the whole step: weights are inputs
of the graph, so blocks of the same shapes share it, and compiling takes as long for thirty of them as for one. The graph is a
function: it reads the cache and gives the new keys and values back, which are written after it. It sees a *bucket* of the
cache, the first 256, 512, ... tokens, and masks what is behind a sequence's end: one graph serves all lengths of a bucket.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from inference.attention import attend
from inference.config import ModelConfig
from inference.context import Cache
from inference.kv_cache import KVCache
from inference.model import Block, Model
from inference.opaque import compilable_block
from inference.rope import rotate
from quantize.errors import InputError

SMALLEST_BUCKET = 256

Pair = tuple[Tensor, Tensor]
Step = Callable[[Block, Tensor, Pair, Pair, Tensor], tuple[Tensor, Tensor, Tensor]]
Graphs = dict[Hashable, Step]


def bucket_of(length: int, longest: int) -> int:
    """The least of 256, 512, 1024, ... that holds ``length`` tokens, and no more than ``longest``."""
    bucket = SMALLEST_BUCKET
    while bucket < length:
        bucket *= 2
    return min(bucket, longest)


def attend_bucket(
    queries: Tensor, keys: Tensor, values: Tensor, past_keys: Tensor, past_values: Tensor, bias: Tensor
) -> Tensor:
    """One query of each sequence over its own key and a bucket of earlier ones.

    Args:
        queries: ``[sequences, heads, head_dim]``, rotated.
        keys, values: the new token's, ``[sequences, kv_heads, head_dim]``.
        past_keys, past_values: ``[sequences, kv_heads, bucket, head_dim]``, finite everywhere.
        bias: ``[sequences, 1, 1, bucket]``: 0 where there is a key, ``-inf`` behind the sequence's end.

    Returns:
        ``[sequences, heads * head_dim]`` in the queries' type.
    """
    sequences, kv_heads, bucket, head_dim = past_keys.shape
    grouped = (queries * head_dim**-0.5).reshape(sequences, kv_heads, -1, head_dim)
    past = torch.matmul(grouped, past_keys.to(queries.dtype).transpose(2, 3)) + bias
    own = (grouped * keys[:, :, None]).sum(-1, keepdim=True)
    shares = torch.softmax(torch.cat((past, own), -1), -1)
    out = torch.matmul(shares[..., :bucket], past_values.to(queries.dtype)) + shares[..., bucket:] * values[:, :, None]
    return out.reshape(sequences, -1)


def block_step(
    config: ModelConfig, block: Block, hidden: Tensor, rotation: Pair, past: Pair, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One block of :meth:`inference.model.Model.run_blocks`, as a function of the cache.

    Args:
        config: of the model.
        block: its layers; see :func:`inference.opaque.compilable`.
        hidden: ``[sequences, hidden_size]``, a token of each.
        rotation: cosines and sines of the tokens' positions, ``[sequences, 1, head_dim]`` each.
        past: keys and values, as for :func:`attend_bucket`.
        bias: as there.

    Returns:
        ``hidden`` behind the block, and the tokens' keys and values, ``[sequences, kv_heads, head_dim]``.
    """
    rotated = config.num_heads + config.num_kv_heads
    heads = block.qkv(block.input_norm(hidden)).view(len(hidden), -1, config.head_dim)
    queries_keys = heads[:, :rotated] if block.head_norms is None else block.head_norms(heads[:, :rotated])
    queries_keys = rotate(queries_keys, *rotation)
    queries, keys, values = queries_keys[:, : config.num_heads], queries_keys[:, config.num_heads :], heads[:, rotated:]
    hidden = hidden + block.o(attend_bucket(queries, keys, values, *past, bias))
    gate, up = block.gate_up(block.post_norm(hidden)).chunk(2, -1)
    return hidden + block.down(functional.silu(gate) * up), keys, values


class CompiledDecode:
    """One token of each of several sequences, through a model and its contiguous cache.

    Graphs are compiled for each number of sequences and each bucket, when they are first needed.

    Attributes:
        seconds: what compiling took, by (sequences, bucket).
    """

    def __init__(self, model: Model, cache: Cache | None) -> None:
        """Make ready; nothing is compiled yet.

        Raises:
            InputError: a cache that is not a :class:`KVCache` with the default attention, or no C++ compiler.
        """
        if not isinstance(cache, KVCache) or cache.attention is not attend:
            kind = "no cache" if cache is None else type(cache).__name__
            raise InputError(
                f"compiled=True runs on the contiguous cache with its default attention, not on {kind}; "
                "use Engine(model, compiled=True) with a cache_dtype of float32, float16 or bfloat16"
            )
        if model.device.type == "cpu":
            need_compiler()
        self.model, self.cache = model, cache
        self.seconds: dict[tuple[int, int], float] = {}
        self._blocks = [compilable_block(block, model.dtype) for block in model.blocks]
        self._kinds = [kind_of(block) for block in self._blocks]
        self._graphs: dict[tuple[int, int], Graphs] = {}

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int], first: int = 0) -> Tensor:
        """Add ``tokens[i]`` to the sequence in slot ``first + i``.

        Args:
            tokens: one for each sequence, at least one.
            first: the first slot.

        Returns:
            Their logits in the compute type, ``[sequences, vocab_size]``.

        Raises:
            InputError: a slot is full.
        """
        cache, model = self.cache, self.model
        slots = range(first, first + len(tokens))
        context = cache.context([1] * len(tokens), slots)
        bucket = bucket_of(max(cache.lengths[slot] for slot in slots), cache.max_tokens)
        graphs = self._compiled(len(tokens), bucket)
        hidden = model.embed(torch.tensor(list(tokens), device=model.device))
        rotation = model.rope.rows(context.positions, context.counts)
        bias = self._bias(context.positions, bucket)
        all_keys, all_values = (part[:, first : slots.stop, :, :bucket] for part in (cache.keys, cache.values))
        rows = []
        for block, kind, past in zip(self._blocks, self._kinds, zip(all_keys, all_values, strict=True), strict=True):
            hidden, keys, values = graphs[kind](block, hidden, rotation, past, bias)
            rows.append((keys, values))
        for buffer, new in zip((cache.keys, cache.values), zip(*rows, strict=True), strict=True):
            stacked = torch.stack(new)
            for index, slot in enumerate(slots):
                buffer[:, slot, :, cache.lengths[slot]] = stacked[:, index]
        context.advance()
        return model.logits(hidden)

    def prepare(self, length: int, sequences: int = 1) -> float:
        """Compile what sequences that grow to ``length`` tokens need, unless it is there; the seconds that took."""
        longest = bucket_of(length, self.cache.max_tokens)
        needed = [*_powers(longest), longest]
        new = [bucket for bucket in needed if (sequences, bucket) not in self._graphs]
        for bucket in new:
            self._compiled(sequences, bucket)
        return sum(self.seconds[sequences, bucket] for bucket in new)

    @torch.inference_mode()
    def _compiled(self, sequences: int, bucket: int) -> Graphs:
        """The graph of each kind of block; what is compiled for it is run once, and the result dropped."""
        key = sequences, bucket
        if key not in self._graphs:
            started = time.perf_counter()
            model, graphs = self.model, {}
            hidden = torch.zeros(sequences, model.config.hidden_size, dtype=model.dtype, device=model.device)
            positions = torch.zeros(sequences, dtype=torch.int64, device=model.device)
            rotation = model.rope.rows(positions, [1] * sequences)
            past = self.cache.keys[0, :sequences, :, :bucket], self.cache.values[0, :sequences, :, :bucket]
            for block, kind in zip(self._blocks, self._kinds, strict=True):
                if kind not in graphs:
                    graphs[kind] = compiled_block(model.config)
                    graphs[kind](block, hidden, rotation, past, self._bias(positions, bucket))
            self._graphs[key] = graphs
            self.seconds[key] = time.perf_counter() - started
        return self._graphs[key]

    def _bias(self, lengths: Tensor, bucket: int) -> Tensor:
        behind = torch.arange(bucket, device=lengths.device) >= lengths[:, None]
        bias = torch.zeros(behind.shape, dtype=self.model.dtype, device=lengths.device)
        return bias.masked_fill_(behind, -torch.inf)[:, None, None]


def compiled_block(config: ModelConfig) -> Step:
    """:func:`block_step`, to be compiled at its first call, for blocks of that call's kind and tensors of its shapes only."""

    def step(block: Block, hidden: Tensor, rotation: Pair, past: Pair, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return block_step(config, block, hidden, rotation, past, bias)

    # torch keeps what it compiled by code object, so each graph gets one of its own. Behind it there is nothing left to
    # choose by guards, and checking those of all weights for every block of every token is what they would cost.
    own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)
    options: dict[str, str | int | bool | Callable[..., Any]] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    compiled: Step = torch.compile(own, fullgraph=True, dynamic=False, options=options)
    return compiled


def kind_of(part: object) -> Hashable:
    """What two blocks must have in common to share a graph: their layers' types, tensors' shapes and types, and all numbers."""
    if isinstance(part, Tensor):
        strides = part.stride() if part.layout == torch.strided else None
        return str(part.layout), tuple(part.shape), strides, part.dtype, part.device
    if isinstance(part, (list, tuple)):
        return tuple(kind_of(each) for each in part)
    if part is None or isinstance(part, (bool, int, float, str, torch.dtype)):
        return part
    return type(part), tuple((key, kind_of(value)) for key, value in sorted(getattr(part, "__dict__", {}).items()))


def _powers(longest: int) -> list[int]:
    found, size = [], SMALLEST_BUCKET
    while size < longest:
        found.append(size)
        size *= 2
    return found


def need_compiler() -> None:
    """Raise :class:`InputError` where torch finds no C++ compiler to compile for the CPU with."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError(
            "compiled=True needs a C++ compiler, and torch finds none; install g++ (apt-get install g++), "
            "set CXX to one, or leave compiled out"
        ) from error
