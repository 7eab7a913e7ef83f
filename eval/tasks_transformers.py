"""lm-eval's interface to a model that transformers runs, already loaded: HFLM, with batches as large as their logits allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from eval.consumers.transformers_model import TransformersArtifact

_LOGITS_BYTES = 2**27  # of a batch, in float32; log-probabilities of the same size stand beside them


class ArtifactLM(HFLM):  # type: ignore[misc]
    """A loaded artifact for lm-eval.

    lm-eval's own batches have a fixed number of prompts, too few for short ones and too many for long ones, or one found out by
    running out of a GPU's memory. Requests come longest first, so a batch is padded to its first one.

    Args:
        loaded: the artifact, in the arithmetic it is to be judged in.
    """

    def __init__(self, loaded: TransformersArtifact) -> None:
        # A tokenizer that adds BOS does so for lm-eval as well: nothing is said of it here.
        super().__init__(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            backend="causal",
            batch_size="auto",
            max_length=min(loaded.max_tokens, 2**20),
        )
        vocabulary = loaded.model.config.get_text_config().vocab_size
        self._tokens_at_once = max(1, _LOGITS_BYTES // (4 * vocabulary))
        self._next, self._size = 0, 1

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See lm-eval."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _batch_scheduler(self, position: int, requests: Sequence[tuple[Any, list[int], list[int]]]) -> int:
        """How many requests the batch holds that the request at ``position`` belongs to."""
        if position == 0 or position == self._next:
            _, context, continuation = requests[position]
            self._size = max(1, self._tokens_at_once // max(1, len(context) + len(continuation) - 1))
            self._next = position + self._size
        return self._size

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """Of windows as long as the model takes them, or of texts to be continued."""
        return max(1, int(self._tokens_at_once) // int(self.max_length))
