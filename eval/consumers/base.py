"""What every consumer is: a way to load an artifact from disk into something that gives logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LoadedArtifact:
    """An artifact as its consumer loaded it.

    Attributes:
        consumer: program and version, such as ``transformers 5.23.0 + gptqmodel 7.6.0``.
        tokenizer: the artifact's own tokenizer.
        compute_dtype: the type the logits are computed in, such as ``float32``.
        logits: token ids int64 ``[batch, tokens]`` to float32 logits ``[batch, tokens, vocabulary]``.
        max_tokens: the longest window the model takes.
        hidden: token ids as above to what the output embedding reads, ``[batch, tokens, hidden]``; None where the consumer
            does not give it.
        head: rows of it, ``[n, hidden]``, to logits ``[n, vocabulary]``, which the caller may overwrite; likewise.
        head_weight: ``[vocabulary, hidden]``, where ``head`` is the product with this matrix and nothing else; else None.
    """

    consumer: str
    tokenizer: Any
    compute_dtype: str
    logits: Callable[[Tensor], Tensor]
    max_tokens: int
    hidden: Callable[[Tensor], Tensor] | None = None
    head: Callable[[Tensor], Tensor] | None = None
    head_weight: Tensor | None = None


@dataclass(frozen=True)
class Consumer:
    """A registry entry.

    Attributes:
        load: ``(artifact directory, device)`` to the loaded artifact, weights in the types they are stored in.
        for_evaluation: turns the loaded artifact into float32 arithmetic where the device computes 16 bits inexactly or
            slowly; called after memory has been measured.
        environment: variables the process must have before it starts.
    """

    load: Callable[[Path, str], LoadedArtifact]
    for_evaluation: Callable[[LoadedArtifact], LoadedArtifact]
    environment: dict[str, str]
