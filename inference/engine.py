"""The two phases of generation: ``prefill`` reads a prompt, ``decode`` adds one token at a time.

Prefill is bound by arithmetic and decode by reading the weights once a token, so they are separate calls that can be timed, and
chosen kernels for, separately.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inference.attention import Attention, attend
from inference.compile import CompiledDecode
from inference.context import Cache, Uncached
from inference.kv_cache import KVCache
from inference.kv_int8 import Int8KVCache
from inference.model import Model
from quantize.errors import InputError


class Engine:
    """A model and the one sequence it is working on.

    Attributes:
        model: the weights.
        max_tokens: the longest sequence.
        cache: keys and values of the tokens seen so far; None for an engine without one.
        compiled: the compiled decode step, None unless it was asked for.
    """

    def __init__(
        self,
        model: Model,
        max_tokens: int | None = None,
        cache_dtype: torch.dtype | None = None,
        use_cache: bool = True,
        attention: Attention = attend,
        cache: Cache | None = None,
        compiled: bool = False,
    ) -> None:
        """Allocate the cache.

        Args:
            model: from :func:`inference.load.load`.
            max_tokens: prompt and generated tokens together; the model's whole context by default.
            cache_dtype: float32, float16, bfloat16 or int8 (:class:`Int8KVCache`); the model's compute type by default.
            use_cache: False runs the whole sequence again for each token, which is what the cache saves.
            attention: how a sequence's queries meet its keys.
            cache: one made already, of any kind, in place of all of the above.
            compiled: decode by :class:`~inference.compile.CompiledDecode`: the first token of each bucket of lengths waits for
                torch.compile (``engine.compiled.prepare`` does it beforehand), those after it are faster.

        Raises:
            InputError: see :class:`KVCache`; for ``compiled``, :class:`~inference.compile.CompiledDecode`.
        """
        self.model = model
        longest = max_tokens or model.config.max_tokens
        self.cache: Cache | None = None
        if cache is not None:
            self.cache, longest = cache, cache.max_tokens
        elif use_cache:
            dtype = cache_dtype or model.dtype
            if dtype == torch.int8:
                self.cache = Int8KVCache(model.config, longest, model.device, attention=attention)
            else:
                self.cache = KVCache(model.config, longest, dtype, model.device, attention=attention)
        self.max_tokens = longest
        self.compiled = CompiledDecode(model, self.cache) if compiled else None
        self._attention = attention
        self._tokens: list[int] = []

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Tensor:
        """Start a new sequence with ``tokens``.

        Args:
            tokens: the prompt.
            chunk: tokens of a forward: bounds the memory of activations, and the time until the engine can turn to something
                else. All at once by default, and always without a cache.

        Returns:
            The last token's logits, float32 ``[vocab_size]``.

        Raises:
            InputError: no tokens, more than the cache holds, an id outside the vocabulary, or a chunk of less than one token.
        """
        self._check(tokens)
        if chunk is not None and chunk < 1:
            raise InputError(f"prefill: chunk={chunk} tokens makes no progress; use 1 or more, such as 256")
        self._tokens = []
        if self.cache is None:
            return self._extend(tokens)
        self.cache.reset()
        size = chunk or len(tokens)
        for start in range(0, len(tokens), size):
            logits = self._extend(tokens[start : start + size])
        return logits

    @torch.inference_mode()
    def decode(self, token: int) -> Tensor:
        """Add one token to the sequence.

        Returns:
            Its logits, float32 ``[vocab_size]``.

        Raises:
            InputError: the cache is full.
        """
        if self.compiled is not None:
            return self.compiled([token])[0].float()
        return self._extend([token])

    def _extend(self, tokens: Sequence[int]) -> Tensor:
        device = self.model.device
        if self.cache is not None:
            context = self.cache.context([len(tokens)])
            rows = torch.tensor([len(tokens) - 1], device=device) if len(tokens) > 1 else None
            return self.model.forward(torch.tensor(tokens, device=device), context, rows)[0].float()
        if len(self._tokens) + len(tokens) > self.max_tokens:
            raise InputError(
                f"{len(self._tokens)} + {len(tokens)} tokens do not fit into max_tokens={self.max_tokens}; shorten the prompt"
            )
        self._tokens += tokens
        last = torch.tensor([len(self._tokens) - 1], device=device)
        whole = Uncached([len(self._tokens)], device, self._attention)
        return self.model.forward(torch.tensor(self._tokens, device=device), whole, last)[0].float()

    def _check(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise InputError("prefill: the prompt has no tokens; give at least one, such as the tokenizer's bos_token_id")
        vocabulary = self.model.config.vocab_size
        if not all(0 <= token < vocabulary for token in tokens):
            wrong = next(token for token in tokens if not 0 <= token < vocabulary)
            raise InputError(f"prefill: token id {wrong} is outside the vocabulary; use 0 to {vocabulary - 1}")
