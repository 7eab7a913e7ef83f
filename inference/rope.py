"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split order of Hugging Face checkpoints.

The pair ``(x[i], x[i + d/2])`` of a head at position ``p`` is turned by the angle ``p * theta**(-2i/d)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantize.errors import InputError

ROPE_TYPES = ("default", "llama3")


def rope_table(rope: Mapping[str, Any], head_dim: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of every position, float32 ``[tokens, 1, head_dim]`` each, for :func:`rotate`.

    Args:
        rope: ``rope_type`` (``default`` or ``llama3``), ``rope_theta``, and what the type needs.
        head_dim: elements of a head, even.
        tokens: positions 0 .. tokens-1.

    Raises:
        InputError: another ``rope_type``.
    """
    inverse = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope["rope_type"] == "llama3":
        inverse = _llama3(inverse, rope)
    elif rope["rope_type"] != "default":
        raise InputError(
            f"config.json: rope_type={rope['rope_type']!r} is not supported; the engine has {', '.join(ROPE_TYPES)}"
        )
    angles = torch.outer(torch.arange(tokens).float(), inverse)[:, None]
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1)


def _llama3(inverse: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's stretch: long wavelengths by ``factor``, short ones not at all, those between in proportion."""
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = original * inverse / (2 * math.pi)  # full turns within the original context
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * inverse / factor + share * inverse


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn ``heads`` ``[tokens, heads, head_dim]`` by the table's rows ``[tokens, 1, head_dim]`` of their positions."""
    # roll by half a head swaps the two halves; the sign of the swap is in the table.
    return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, -1), sine)
