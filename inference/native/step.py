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
    **pointers("blocks", "norm"),
    head=_Layers,
    **pointers("stream", "wide", "partial"),
)


class NativeStep:
    """The decode step of one model over the first slot of one cache."""

    def __init__(self, model: Model, cache: Cache | None) -> None:
        """Describe them; both are kept, nothing is copied.

        Raises:
            InputError: a model not loaded with ``native=True``, a cache or an attention the step has not, no C++ compiler.
        """
        if type(cache) is not KVCache or not supports(cache.keys) or cache.attention is not attend:
            raise InputError(
                "native=true decodes over a plain float32 or float16 cache with the default attention; use one, or native=false"
            )
        self._model, self._cache = model, cache
        self._kept: list[Any] = []
        self._step = library().decode_step
        config = model.config
        middle = model.blocks[0].gate_up.out_features // 2
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self._stream = torch.empty(config.hidden_size)
        threads = torch.get_num_threads()
        partial = torch.empty(threads, config.num_heads * (config.head_dim + 2))
        buffers = (self._stream, torch.empty(max(width, middle)), partial)
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
            ctypes.addressof(blocks),
            self._norm(model.norm),
            self._layers(model.head),
            *(self._address(buffer) for buffer in buffers),
        )
        self._reference = ctypes.byref(self._described)
        self._kept.append(blocks)

    @torch.inference_mode()
    def __call__(self, token: int) -> Tensor:
        """Add ``token`` to the sequence: its logits, float32 ``[vocab_size]``.

        Raises:
            InputError: the cache is full.
        """
        cache, model = self._cache, self._model
        cache.check_room(1)
        position = cache.lengths[0]
        cosine, sine = model.rope.row(position)
        self._stream.copy_(model.embedding[token])
        logits = torch.empty(model.config.vocab_size)
        self._step(self._reference, cosine.data_ptr(), sine.data_ptr(), position, logits.data_ptr())
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
