"""Attention of several sequences with a new token each, in C++: each over its own keys, without padding to the longest."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from inference.native.build import library
from inference.native.structures import integers, pointers, structure

# step.cpp's Batch.
_Batch = structure("_Batch", **integers("heads", "kv_heads", "head_dim", "count"), **pointers("ends", "queries", "out"))


def supports(cache: Tensor) -> bool:
    """Whether keys and values like ``cache`` can be attended to here."""
    return cache.device.type == "cpu" and cache.dtype in (torch.float32, torch.float16)


def attend_slots(queries: Tensor, keys: Tensor, values: Tensor, slots: Tensor, ends: Tensor) -> Tensor:
    """One query of each sequence over all its keys, in slots.

    Args:
        queries: floating ``[sequences, heads, head_dim]``; computed with in float32.
        keys, values: one layer of a cache, ``[slots, kv_heads, max_tokens, head_dim]``, float32 or float16.
        slots, ends: int64 ``[sequences]``: where each sequence is, and how many keys it has.

    Returns:
        ``[sequences, heads * head_dim]`` in the queries' type.

    Raises:
        InputError: no C++ compiler.
    """
    return _call("attend_in_slots", queries, keys, values, ends, keys.shape[1], (keys.shape[2], slots))


def attend_pages(queries: Tensor, keys: Tensor, values: Tensor, tables: Tensor, ends: Tensor) -> Tensor:
    """The same in pages.

    Args:
        keys, values: one layer of a pool, ``[kv_heads, blocks, block_size, head_dim]``, float32 or float16.
        tables: int64 ``[sequences, width]``: a sequence's blocks in order, anything behind those that its ``ends`` needs.

    Raises:
        InputError: no C++ compiler.
    """
    more = (keys.shape[1], keys.shape[2], tables, tables.shape[1])
    return _call("attend_in_pages", queries, keys, values, ends, keys.shape[0], more)


def _call(
    name: str, queries: Tensor, keys: Tensor, values: Tensor, ends: Tensor, kv_heads: int, more: tuple[Any, ...]
) -> Tensor:
    wide, (count, heads, head_dim) = queries.float().contiguous(), queries.shape
    out = torch.empty(count, heads * head_dim)
    batch = _Batch(heads, kv_heads, head_dim, count, *(tensor.data_ptr() for tensor in (ends, wide, out)))
    rest = [item.data_ptr() if isinstance(item, Tensor) else item for item in (keys, values, *more)]
    getattr(library(), name)(ctypes.byref(batch), torch.get_num_threads(), keys.dtype == torch.float16, *rest)
    return out.to(queries.dtype)
