"""Attention tile by tile, with an online softmax: FlashAttention's algorithm in plain tensors.

Dao et al. 2022 (arXiv:2205.14135), algorithm 1, with the loops as in FlashAttention-2 (Dao 2023, arXiv:2307.08691,
algorithm 1): a tile of queries stays in fast memory and meets one tile of keys and values after the other. The running maximum
and the running sum of each row make the softmax exact without ever holding a row of scores, so memory grows with ``N`` and not
with ``N^2``. Here "fast memory" is a processor's cache and the tiles are tensors; it shows the algorithm and counts what it
moves. It does not beat torch's fused kernel, which is the same algorithm in machine code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inference.attention_naive import Traffic
from quantize.errors import InputError


class TiledAttention:
    """:class:`~inference.attention.Attention` by tiles.

    Attributes:
        query_tile, key_tile: rows of a tile.
        traffic: what has been moved so far; keys and values once for each tile of queries of each query head.
    """

    def __init__(self, query_tile: int = 64, key_tile: int = 64) -> None:
        """Raises :class:`InputError` for tiles without rows."""
        if query_tile < 1 or key_tile < 1:
            raise InputError(f"attention: tiles of {query_tile} and {key_tile} rows hold nothing; use 1 or more, such as 64")
        self.query_tile, self.key_tile = query_tile, key_tile
        self.traffic = Traffic()

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens, heads, _ = queries.shape
        shared = heads // keys.shape[0]
        keys, values = (part.to(queries.dtype).repeat_interleave(shared, 0) for part in (keys, values))
        rows = queries.transpose(0, 1)
        tiles = [
            self._rows(rows[:, first : first + self.query_tile], keys, values, mask, first, tokens)
            for first in range(0, tokens, self.query_tile)
        ]
        return torch.cat(tiles, 1).transpose(0, 1).reshape(tokens, -1)

    def _rows(self, rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, first: int, tokens: int) -> Tensor:
        """One tile of queries, ``[heads, n, head_dim]``, over all the keys it may see."""
        heads, count, head_dim = rows.shape
        length = keys.shape[1]
        self.traffic.load(rows)
        maximum = rows.new_full((heads, count, 1), -torch.inf)
        total = rows.new_zeros((heads, count, 1))
        out = torch.zeros_like(rows)
        # Behind the last query's own position there is nothing to see: half of all tiles, for a whole text.
        end = length if mask is not None else length - tokens + first + count
        for start in range(0, end, self.key_tile):
            stop = min(start + self.key_tile, end)
            key_tile, value_tile = keys[:, start:stop], values[:, start:stop]
            self.traffic.load(key_tile, value_tile)
            scores = (rows @ key_tile.transpose(1, 2)) * head_dim**-0.5
            seen = _seen(mask, first, count, start, stop, tokens, length, rows.device)
            if seen is not None:
                scores = scores.masked_fill(~seen, -torch.inf)
            larger = torch.maximum(maximum, scores.amax(-1, keepdim=True))
            # A row that has seen nothing yet has no maximum to subtract.
            finite = larger.masked_fill(larger == -torch.inf, 0)
            shares = torch.exp(scores - finite)
            kept = torch.exp(maximum - finite)
            total = total * kept + shares.sum(-1, keepdim=True)
            out = out * kept + shares @ value_tile
            maximum = larger
        out = out / total
        self.traffic.store(out)
        return out


def _seen(
    mask: Tensor | None, first: int, count: int, start: int, stop: int, tokens: int, length: int, device: torch.device
) -> Tensor | None:
    """The tile's part of the mask, or None where all is seen."""
    if mask is not None:
        return mask[first : first + count, start:stop]
    if stop <= length - tokens + first + 1:
        return None
    queries = torch.arange(first + length - tokens, first + length - tokens + count, device=device)
    return torch.arange(start, stop, device=device) <= queries[:, None]


def tiled_elements(tokens: int, head_dim: int, heads: int, query_tile: int) -> int:
    """The formula: elements moved for ``tokens`` queries over as many keys.

    ``2 N d`` for queries and output, and for each tile of queries the keys and values up to its end:
    ``sum over tiles of 2 d * end``, about ``N^2 d / query_tile``. With tiles of ``M / 4d`` rows, which fill a fast memory of
    ``M`` elements, that is theorem 2's ``O(N^2 d^2 / M)``.
    """
    ends = (min(first + query_tile, tokens) for first in range(0, tokens, query_tile))
    return heads * (2 * tokens * head_dim + sum(2 * head_dim * end for end in ends))
