"""Attention of several sequences with a new token each, in C++: each over its own keys, without padding to the longest."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from inference.native.build import library
from inference.native.structures import POINTER

CACHE_DTYPES = (torch.float32, torch.float16)


def attend_slots(queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor, ends: Tensor) -> Tensor:
    """One query of each sequence over all its keys.

    Args:
        queries: float32 ``[sequences, heads, head_dim]``.
        keys, values: one layer of a cache, ``[slots, kv_heads, max_tokens, head_dim]``, one of :data:`CACHE_DTYPES`.
        slots, ends: int64 ``[sequences]``: where each sequence is, and how many keys it has.

    Returns:
        ``[sequences, heads * head_dim]``.

    Raises:
        InputError: no C++ compiler.
    """
    queries, (count, heads, head_dim) = queries.contiguous(), queries.shape
    out = torch.empty(count, heads * head_dim)
    sizes = (keys.dtype == torch.float16, keys.shape[2], heads, keys.shape[1], head_dim)
    library().attend_each(
        *(POINTER(tensor.data_ptr()) for tensor in (keys, values)),
        *map(ctypes.c_int64, sizes),
        *(POINTER(tensor.data_ptr()) for tensor in (slots, ends)),
        ctypes.c_int64(count),
        *(POINTER(tensor.data_ptr()) for tensor in (queries, out)),
        ctypes.c_int64(torch.get_num_threads()),
    )
    return out
