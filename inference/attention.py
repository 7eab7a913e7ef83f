"""Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) over a sequence's cached keys and values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``softmax(Q K^T / sqrt(head_dim)) V``; query ``i`` of ``n`` sees all but the last ``n - 1 - i`` keys.

    Args:
        queries: ``[tokens, heads, head_dim]``, the newest tokens of the sequence.
        keys, values: ``[kv_heads, length, head_dim]``, ``length >= tokens``; ``heads`` is a multiple of ``kv_heads``.

    Returns:
        ``[tokens, heads * head_dim]`` in the queries' type.
    """
    if keys.dtype != queries.dtype:
        keys, values = keys.to(queries.dtype), values.to(queries.dtype)
    return _attend_one(queries, keys, values) if queries.shape[0] == 1 else _attend_many(queries, keys, values)


def _attend_one(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Decode: nothing is masked, so the query heads that share a key head are the rows of one small matrix.

    Written out: at one query, torch's fused kernel spends more on its set-up than these three products take.
    """
    kv_heads, _, head_dim = keys.shape
    grouped = queries.view(kv_heads, -1, head_dim)
    scores = torch.bmm(grouped * head_dim**-0.5, keys.transpose(1, 2))
    return torch.bmm(torch.softmax(scores, -1), values).view(1, -1)


def _attend_many(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    tokens, length = queries.shape[0], keys.shape[1]
    mask = None
    if length != tokens:  # SDPA's is_causal aligns the mask with the first key, a continued sequence with the last
        mask = torch.ones(tokens, length, dtype=torch.bool, device=queries.device).tril(length - tokens)
    out = functional.scaled_dot_product_attention(
        queries.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out[0].transpose(0, 1).reshape(tokens, -1)
