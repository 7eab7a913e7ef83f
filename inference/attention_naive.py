"""Attention as its formula reads: the whole matrix of scores is written out, read, and written again.

For ``N`` queries and keys of ``d`` elements a head moves ``4 N d + 4 N^2`` elements between slow and fast memory
(Dao et al. 2022, arXiv:2205.14135, algorithm 0 and theorem 2): ``Q, K -> S``, ``S -> P``, ``P, V -> O``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.attention import causal_mask


@dataclass
class Traffic:
    """Elements moved between slow and fast memory, counted where the code moves them.

    Attributes:
        read, written: elements.
        largest: elements of the largest intermediate result that stood in slow memory at once.
    """

    read: int = 0
    written: int = 0
    largest: int = 0

    def load(self, *tensors: Tensor) -> None:
        """These were read."""
        self.read += sum(tensor.numel() for tensor in tensors)

    def store(self, tensor: Tensor, intermediate: bool = False) -> None:
        """This was written."""
        self.written += tensor.numel()
        if intermediate:
            self.largest = max(self.largest, tensor.numel())


class NaiveAttention:
    """:class:`~inference.attention.Attention` with the scores written out.

    Attributes:
        traffic: what has been moved so far; keys and values once for each query head that uses them.
    """

    def __init__(self) -> None:
        self.traffic = Traffic()

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens, heads, head_dim = queries.shape
        mask = causal_mask(tokens, keys.shape[1], queries.device) if mask is None else mask
        shared = heads // keys.shape[0]
        keys, values = (part.to(queries.dtype).repeat_interleave(shared, 0) for part in (keys, values))
        rows = queries.transpose(0, 1)
        scores = (rows @ keys.transpose(1, 2)) * head_dim**-0.5
        self.traffic.load(rows, keys)
        self.traffic.store(scores, intermediate=True)
        shares = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
        self.traffic.load(scores)
        self.traffic.store(shares, intermediate=True)
        out = shares @ values
        self.traffic.load(shares, values)
        self.traffic.store(out)
        return out.transpose(0, 1).reshape(tokens, -1)


def naive_elements(tokens: int, head_dim: int, heads: int) -> int:
    """The formula: elements moved for ``tokens`` queries over as many keys."""
    return heads * (4 * tokens * head_dim + 4 * tokens**2)
