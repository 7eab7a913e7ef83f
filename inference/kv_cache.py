"""The key/value cache: one contiguous buffer, allocated once, that prefill and decode write into in place."""

from __future__ import annotations

import torch
from torch import Tensor

from inference.config import ModelConfig
from quantize.errors import InputError

CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class KVCache:
    """Keys and values of one sequence.

    Attributes:
        keys, values: ``[layers, kv_heads, max_tokens, head_dim]`` in the cache's type.
        length: tokens written so far; the model advances it once all layers have written theirs.
    """

    def __init__(
        self, config: ModelConfig, max_tokens: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        """Allocate room for ``max_tokens`` tokens.

        Raises:
            InputError: more tokens than the model's positions, or a type that is not float32, float16 or bfloat16.
        """
        if not 0 < max_tokens <= config.max_tokens:
            raise InputError(f"kv_cache: max_tokens={max_tokens} is outside the model's context; use 1 to {config.max_tokens}")
        if dtype not in CACHE_DTYPES:
            raise InputError(f"kv_cache: dtype={dtype} is not supported; use {', '.join(map(str, CACHE_DTYPES))}")
        shape = (config.num_layers, config.num_kv_heads, max_tokens, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_tokens(self) -> int:
        """Tokens there is room for."""
        return self.keys.shape[2]

    def nbytes(self) -> int:
        """Bytes of both buffers."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def check_room(self, tokens: int) -> None:
        """Raise :class:`InputError` unless ``tokens`` more tokens fit."""
        if self.length + tokens > self.max_tokens:
            raise InputError(
                f"kv_cache: {self.length} + {tokens} tokens do not fit into max_tokens={self.max_tokens}; "
                f"make it {self.length + tokens} or shorten the prompt"
            )

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new tokens behind ``length`` and give all of that layer's, old and new.

        Args:
            layer: its index.
            keys, values: ``[tokens, kv_heads, head_dim]``, floating.

        Returns:
            Keys and values, views ``[kv_heads, length + tokens, head_dim]`` in the cache's type.
        """
        end = self.length + keys.shape[0]
        all_keys, all_values = self.keys[layer, :, :end], self.values[layer, :, :end]
        all_keys[:, self.length :].copy_(keys.transpose(0, 1))
        all_values[:, self.length :].copy_(values.transpose(0, 1))
        return all_keys, all_values

    def reset(self) -> None:
        """Forget the sequence; the buffers stay."""
        self.length = 0
