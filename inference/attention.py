"""Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) over a sequence's keys and values: the default."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Attention(Protocol):
    """What a cache calls for one sequence; :func:`attend` is the default, its equals are interchangeable."""

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """``softmax(Q K^T / sqrt(head_dim)) V``.

        Args:
            queries: ``[tokens, heads, head_dim]``, the newest tokens of the sequence.
            keys, values: ``[kv_heads, length, head_dim]``; ``heads`` is a multiple of ``kv_heads``. Types narrower than the
                queries' are widened.
            mask: bool ``[tokens, length]``, true where a query may look, at least once a row. By default query ``i`` of ``n``
                sees all but the last ``n - 1 - i`` keys (``length >= tokens``).

        Returns:
            ``[tokens, heads * head_dim]`` in the queries' type.
        """


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """:class:`Attention` by torch's fused kernel, or, at one query, written out."""
    if keys.dtype != queries.dtype:
        keys, values = keys.to(queries.dtype), values.to(queries.dtype)
    if queries.shape[0] == 1 and mask is None:
        return _attend_one(queries, keys, values)
    return _attend_many(queries, keys, values, mask)


def causal_mask(tokens: int, length: int, device: torch.device | None = None) -> Tensor:
    """Bool ``[tokens, length]``: query ``i`` sees keys up to ``length - tokens + i``."""
    return torch.ones(tokens, length, dtype=torch.bool, device=device).tril(length - tokens)


def attend_each(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """One query of each of several sequences, whose keys lie in one buffer of equal lengths.

    Args:
        queries: ``[sequences, heads, head_dim]``.
        keys, values: ``[sequences, kv_heads, length, head_dim]``, finite also where nothing is stored.
        bias: ``[sequences, 1, 1, length]`` in the queries' type: 0 where a sequence has a key, ``-inf`` behind its end.

    Returns:
        ``[sequences, heads * head_dim]`` in the queries' type.
    """
    if keys.dtype != queries.dtype:
        keys, values = keys.to(queries.dtype), values.to(queries.dtype)
    sequences, kv_heads, _, head_dim = keys.shape
    grouped = queries.reshape(sequences, kv_heads, -1, head_dim)
    scores = torch.matmul(grouped * head_dim**-0.5, keys.transpose(2, 3)).add_(bias)
    return torch.matmul(torch.softmax(scores, -1), values).view(sequences, -1)


def _attend_one(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Decode: nothing is masked, so the query heads that share a key head are the rows of one small matrix.

    Written out: at one query, torch's fused kernel spends more on its set-up than these three products take.
    """
    kv_heads, _, head_dim = keys.shape
    grouped = queries.view(kv_heads, -1, head_dim)
    scores = torch.bmm(grouped * head_dim**-0.5, keys.transpose(1, 2))
    return torch.bmm(torch.softmax(scores, -1), values).view(1, -1)


def _attend_many(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    tokens, length = queries.shape[0], keys.shape[1]
    if mask is None and length != tokens:  # is_causal aligns the mask with the first key, a continued sequence with the last
        mask = causal_mask(tokens, length, queries.device)
    out = functional.scaled_dot_product_attention(
        queries.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out[0].transpose(0, 1).reshape(tokens, -1)
