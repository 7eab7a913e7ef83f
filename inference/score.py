"""How well a model predicts a text: the engine's own measure, for what changes a model while it runs.

Figures of artifacts come from their consumers (``eval/``); this one is for caches, windows, scalings and conversions, which
only the engine has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from inference.context import Cache
from inference.model import Model
from quantize.errors import InputError


@torch.inference_mode()
def losses(model: Model, tokens: Sequence[int], cache: Cache, chunk: int = 256) -> Tensor:
    """Negative log-likelihood of every token but the first, given all before it that ``cache`` keeps.

    Args:
        model: the weights.
        tokens: at least two.
        cache: replaced by this text; with room for it.
        chunk: tokens of a forward; the figures depend on it only where a cache's contents do (dynamic scaling).

    Returns:
        float32 ``[len(tokens) - 1]``, in nats.

    Raises:
        InputError: fewer than two tokens, or no room.
    """
    if len(tokens) < 2 or chunk < 1:
        raise InputError(
            f"perplexity of {len(tokens)} tokens in chunks of {chunk} is none; use 2 tokens and a chunk of 1 or more"
        )
    cache.reset()
    ids = torch.tensor(tokens, device=model.device)
    found = []
    for start in range(0, len(tokens) - 1, chunk):
        part = ids[start : min(start + chunk, len(tokens) - 1)]
        logits = model.forward(part, cache.context([len(part)])).float()
        found.append(functional.cross_entropy(logits, ids[start + 1 : start + 1 + len(part)], reduction="none"))
    return torch.cat(found)


def perplexity(model: Model, tokens: Sequence[int], cache: Cache, chunk: int = 256) -> float:
    """``exp`` of the mean of :func:`losses`, whose arguments and errors it has."""
    return math.exp(float(losses(model, tokens, cache, chunk).double().mean()))
