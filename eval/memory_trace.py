"""Activations of a prefill, found by running the model's own forward on the meta device.

Nothing is computed and nothing is stored, but every tensor has its size and its time of life. The peak is the largest sum of
live tensors; for a Llama it comes to about the larger of (``n`` tokens, ``e`` bytes an element)::

    logits   n * (hidden + vocabulary) * e
    MLP      n * (4 * hidden + 3 * intermediate) * e    embeddings, input, residual, norm; gate, up and their product

but no such formula has to be trusted: a family's extra tensors (attention masks beyond a sliding window, eager attention's
``n * n`` scores, capped logits, experts' sorted copies) are there because its code makes them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_LARGEST = 4  # live tensors that a trace names


@dataclass(frozen=True)
class LiveTensor:
    """A tensor that is alive at the peak: its shape, type and bytes of storage."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Trace:
    """What a prefill needs besides weights and the cache it leaves behind.

    Attributes:
        activation_bytes: peak of live tensors that are neither weights nor the KV cache. Cache that is replaced while its
            successor exists already (a later chunk of a prefill) counts as long as both are there.
        largest: the largest tensors alive then, largest first.
        cache: the cache object after the prefill, of meta tensors.
    """

    activation_bytes: int
    largest: tuple[LiveTensor, ...]
    cache: Any


class _Lives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes when each storage that an operation returns begins and ends to exist."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, int]] = []  # a storage's number, bytes gained
        self.shown: dict[int, LiveTensor] = {}  # each storage, by number, in the last shape that shows all of it
        self._numbers: dict[int, int] = {}  # address of a living storage to its number
        self._references: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:  # its meta kernel refuses types that the real ones take
            result = args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        else:
            result = func(*args, **(kwargs or {}))
        self.see(leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor))
        return result

    def see(self, tensors: Iterable[Tensor]) -> set[int]:
        """The numbers of the tensors' storages; those not seen before begin to exist now."""
        return {self._number(tensor) for tensor in tensors}

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self._numbers:
            number = len(self.events)

            def gone(_: Any) -> None:
                del self._numbers[address], self._references[number]
                self.events.append((number, -size))

            self._numbers[address] = number
            self._references[number] = weakref.ref(storage, gone)
            self.events.append((number, size))
        if tensor.numel() * tensor.itemsize == size:
            shown = LiveTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), size)
            self.shown[self._numbers[address]] = shown
        return self._numbers[address]


class _FusedAttention(TorchFunctionMode):
    """Scaled dot product attention as its fused kernels do it: an output, one number a row, and no matrix of scores.

    A mask of booleans becomes one of numbers first. Where keys have to be repeated for the queries' heads by broadcasting, no
    fused kernel takes them, and the scores are there as in plain arithmetic. A CPU's kernel has buffers for each thread.
    """

    def __init__(self, cpu: bool) -> None:
        super().__init__()
        self._threads = torch.get_num_threads() if cpu else 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        query, value, mask = named["query"], named["value"], named.get("attn_mask")
        batch, heads, tokens, _ = query.shape
        if named["key"].shape[1] != heads and not named.get("enable_gqa"):
            scores = torch.ops.aten._scaled_dot_product_attention_math
            return scores(query, named["key"], value, mask, is_causal=named.get("is_causal", False))[0]
        numbers = query.new_empty(mask.shape) if mask is not None and mask.dtype == torch.bool else None
        normalizer = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        buffers = query.new_empty(self._threads * _buffer_bytes(query, named["key"]), dtype=torch.uint8)
        del normalizer, numbers, buffers
        return output


def _buffer_bytes(query: Tensor, key: Tensor) -> int:
    """What a thread of torch's CPU kernel works in (``cpu_flash_attention``): a tile's scores, its sums and its output."""
    rows = next(size for least, size in ((768, 256), (192, 64), (0, 32)) if query.shape[2] >= least)
    rows, columns = min(rows, query.shape[2]), min(512, key.shape[2])
    copy = rows * columns * query.itemsize if query.itemsize < 4 else 0  # of the scores, in the inputs' type
    return 4 * rows * (columns + 2 + query.shape[3]) + copy


def trace_prefill(
    model: nn.Module,
    make_cache: Callable[[], Any],
    context: int,
    batch: int,
    *,
    chunk: int | None = None,
    last: bool = False,
    cpu: bool = False,
) -> Trace:
    """Follow a prefill of ``batch`` sequences of ``context`` tokens.

    Args:
        model: causal language model of transformers on the meta device, in the type that it computes in.
        make_cache: gives an empty KV cache.
        context: tokens of a sequence.
        batch: sequences.
        chunk: tokens in one forward; the last one, which has the most cache before it, is followed. None: all in one.
        last: logits of the last position only, as ``generate`` asks for, instead of all.
        cpu: count the buffers of a CPU's attention kernel, for as many threads as torch has in this process.
    """
    keep = {"logits_to_keep": 1} if last else {}
    cache = make_cache()
    tokens = min(chunk or context, context)
    # Not inference mode: there, composite operations arrive whole, and what they allocate inside would not be seen.
    with torch.no_grad(), _FusedAttention(cpu):
        if context > tokens:
            with _Lives():  # for its stand-ins of operations that have no meta kernel
                model(input_ids=_ids(batch, context - tokens), past_key_values=cache, use_cache=True, **keep)
        ids, lives = _ids(batch, tokens), _Lives()
        weights = lives.see([*model.parameters(), *model.buffers(), ids])
        cached = lives.see(_cached(cache))
        with lives:
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, **keep)
        cached |= lives.see(_cached(cache))
        events = list(lives.events)  # before the logits go
        del output
    final = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _cached(cache)}.values())
    peak, alive = _replay(events, weights, cached, final)
    largest = sorted((lives.shown[number] for number in alive), key=lambda item: -item.bytes)[:_LARGEST]
    return Trace(peak, tuple(largest), cache)


def _replay(events: Sequence[tuple[int, int]], weights: set[int], cached: set[int], final: int) -> tuple[int, set[int]]:
    """The peak of what is neither a weight nor ``final`` bytes of cache, and the storages alive then."""
    live: set[int] = set()
    at_peak: set[int] = set()
    running = cache = peak = 0
    for number, size in events:
        if number in weights or size == 0:
            continue
        if number in cached:
            cache += size
        else:
            running += size
            live.symmetric_difference_update({number})
        total = running + max(0, cache - final)
        if total > peak:
            peak, at_peak = total, set(live)
    return peak, at_peak


def _ids(batch: int, tokens: int) -> Tensor:
    return torch.zeros(batch, tokens, dtype=torch.int64, device="meta")


def _cached(cache: Any) -> Iterable[Tensor]:
    for layer in cache.layers:
        if getattr(layer, "is_initialized", False):
            yield layer.keys
            yield layer.values
