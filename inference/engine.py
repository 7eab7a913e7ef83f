"""The two phases of generation: ``prefill`` reads a prompt at once, ``decode`` one token at a time.

Prefill is bound by arithmetic and decode by reading the weights once a token, so they are separate calls that can be timed, and
chosen kernels for, separately.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inference.kv_cache import KVCache
from inference.model import Model
from quantize.errors import InputError


class Engine:
    """A model and the cache of the one sequence it is working on.

    Attributes:
        model: the weights.
        cache: keys and values of the tokens seen so far.
    """

    def __init__(self, model: Model, max_tokens: int | None = None, cache_dtype: torch.dtype | None = None) -> None:
        """Allocate the cache.

        Args:
            model: from :func:`inference.load.load`.
            max_tokens: prompt and generated tokens together; the model's whole context by default.
            cache_dtype: float32, float16 or bfloat16; the model's compute type by default.

        Raises:
            InputError: see :class:`KVCache`.
        """
        self.model = model
        self.cache = KVCache(model.config, max_tokens or model.config.max_tokens, cache_dtype or model.dtype, model.device)

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Start a new sequence with ``tokens``.

        Returns:
            The last token's logits, float32 ``[vocab_size]``.

        Raises:
            InputError: no tokens, more than the cache holds, or an id outside the vocabulary.
        """
        if not tokens:
            raise InputError("prefill: the prompt has no tokens; give at least one, such as the tokenizer's bos_token_id")
        vocabulary = self.model.config.vocab_size
        if not all(0 <= token < vocabulary for token in tokens):
            wrong = next(token for token in tokens if not 0 <= token < vocabulary)
            raise InputError(f"prefill: token id {wrong} is outside the vocabulary; use 0 to {vocabulary - 1}")
        self.cache.reset()
        return self.model.forward(torch.tensor(tokens, device=self.model.device), self.cache)[0].float()

    @torch.inference_mode()
    def decode(self, token: int) -> Tensor:
        """Add one token to the sequence.

        Returns:
            Its logits, float32 ``[vocab_size]``.

        Raises:
            InputError: the cache is full.
        """
        return self.model.forward(torch.tensor([token], device=self.model.device), self.cache)[0].float()
