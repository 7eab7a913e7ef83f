"""Python's side of ``step.cpp``: a model's and a cache's memory described to it, and an engine that decodes by it."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from inference.attention import attend
from inference.context import Cache
from inference.engine import Engine
from inference.kv_cache import KVCache
from inference.linear import Linear, SideBySide
from inference.model import Model
from inference.native.attention import supports
from inference.native.build import library
from inference.native.linear import NativeLinear
from inference.native.structures import LINEAR, POINTER, integers, pointers, structure
from inference.norm import RMSNorm
from quantize.errors import InputError

# Field by field as in step.cpp.
_Layers = structure("_Layers", count=ctypes.c_int64, parts=POINTER)
_Block = structure(
    "_Block",
    **pointers("input_norm", "head_norms", "post_norm"),
    **dict.fromkeys(("qkv", "o", "gate_up", "down"), _Layers),
    **pointers("keys", "values"),
)
_Model = structure(
    "_Model",
    **integers("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "max_tokens", "half_cache", "threads"),
    eps=ctypes.c_double,
    head_eps=ctypes.c_double,
    **integers("width"),
    **pointers("embedding", "blocks", "norm"),
    head=_Layers,
    **pointers("stream", "wide", "partial"),
)

_WIDTHS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of the embedding; step.cpp's order


class NativeStep:
    """The decode step of one model over the first slot of one cache."""

    def __init__(self, model: Model, cache: Cache | None) -> None:
        """Describe them; both are kept, nothing is copied.

        Raises:
            InputError: a model not loaded with ``native=True``, a cache, attention or embedding the step has not, no compiler.
        """
        if type(cache) is not KVCache or not supports(cache.keys) or cache.attention is not attend:
            raise InputError(
                "native=true decodes over a plain float32 or float16 cache with the default attention; use one, or native=false"
            )
        if model.embedding.dtype not in _WIDTHS:
            raise InputError(f"native=true looks tokens up in float32, float16 or bfloat16, not {model.embedding.dtype}")
        self._model, self._cache = model, cache
        self._kept: list[Any] = []
        self._step = library().decode_step
        config = model.config
        self._vocabulary = config.vocab_size
        middle = model.blocks[0].gate_up.out_features // 2
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        threads = torch.get_num_threads()
        partial = torch.empty(threads, config.num_heads * (config.head_dim + 2))
        buffers = (torch.empty(config.hidden_size), torch.empty(max(width, middle)), partial)
        blocks = (_Block * config.num_layers)(*(self._block(index) for index in range(config.num_layers)))
        head_norms = model.blocks[0].head_norms
        self._described = _Model(
            config.num_layers,
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            middle,
            cache.max_tokens,
            cache.keys.dtype == torch.float16,
            threads,
            model.norm.scaled_eps,
            head_norms.scaled_eps if head_norms else 0.0,
            _WIDTHS[model.embedding.dtype],
            self._address(model.embedding),
            ctypes.addressof(blocks),
            self._norm(model.norm),
            self._layers(model.head),
            *(self._address(buffer) for buffer in buffers),
        )
        self._reference = ctypes.byref(self._described)
        self._kept.append(blocks)

    def __call__(self, token: int) -> Tensor:
        """Add ``token`` to the sequence: its logits, float32 ``[vocab_size]``.

        Raises:
            InputError: the cache is full.
            IndexError: no such token.
        """
        # Between two steps the weights have passed through every cache: each torch operation here costs 20 to 40 microseconds.
        cache = self._cache
        cache.check_room(1)
        if not 0 <= token < self._vocabulary:
            raise IndexError(f"token {token} of a vocabulary of {self._vocabulary}")
        position = cache.lengths[0]
        found = self._model.rope.row_in_table(position)
        if found is None:
            rows = self._model.rope.row(position)
            found = rows[0].data_ptr(), rows[1].data_ptr()
        logits = torch.empty(self._vocabulary)
        self._step(self._reference, token, *found, position, logits.data_ptr())
        cache.lengths[0] = position + 1
        return logits

    def _block(self, index: int) -> Any:
        block, cache = self._model.blocks[index], self._cache
        return _Block(
            self._norm(block.input_norm),
            self._norm(block.head_norms) if block.head_norms else None,
            self._norm(block.post_norm),
            *(self._layers(part) for part in (block.qkv, block.o, block.gate_up, block.down)),
            cache.keys[index, 0].data_ptr(),
            cache.values[index, 0].data_ptr(),
        )

    def _norm(self, norm: RMSNorm) -> int:
        return self._address(norm.scaled_weight)

    def _layers(self, layer: Linear) -> Any:
        parts = layer.layers if isinstance(layer, SideBySide) else [layer]
        described = (LINEAR * len(parts))(*(self._linear(part) for part in parts))
        self._kept.append(described)
        return _Layers(len(parts), ctypes.addressof(described))

    def _linear(self, layer: Linear) -> Any:
        if not isinstance(layer, NativeLinear):
            raise InputError(f"a {type(layer).__name__} has no native product; load the model with native=True")
        self._kept.append(layer)
        return layer.described

    def _address(self, tensor: Tensor) -> int:
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()


class NativeEngine(Engine):
    """An :class:`~inference.engine.Engine` that decodes by :class:`NativeStep`; prefill is torch's."""

    def __init__(self, model: Model, max_tokens: int | None = None, cache_dtype: torch.dtype | None = None) -> None:
        """As :class:`~inference.engine.Engine`.

        Raises:
            InputError: see :class:`NativeStep` and :class:`~inference.kv_cache.KVCache`.
        """
        super().__init__(model, max_tokens, cache_dtype)
        self._step = NativeStep(model, self.cache)

    def decode(self, token: int) -> Tensor:
        return self._step(token)


def engine_of(model: Model, max_tokens: int, cache_dtype: torch.dtype | None = None) -> Engine:
    """The engine that ``model`` was loaded for: :class:`NativeEngine` where that was with ``native=True``."""
    return (NativeEngine if model.native else Engine)(model, max_tokens, cache_dtype)
