"""Scoring windows: hidden states once, logits for a few positions at a time.

A window's logits for the whole vocabulary are the largest tensor of an evaluation by far (1024 x 49152 in float32: 192 MiB,
and as much again for their logarithms). So a model's body runs once a window, its output embedding is applied to a chunk of the
scored positions only, and what is wanted of the chunk is taken before the next one is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from eval.consumers.base import LoadedArtifact
from eval.protocols import Window
from quantize.logs import progress

CHUNK_BYTES = 32 * 2**20
_PROBED = 8  # tokens on which a model's body and head are tried out
_TOLERANCE = 1e-5  # of the largest logit

Chunks = Callable[[Window], Iterator[Tensor]]


class Watcher(Protocol):
    """What looks at the logits of scored positions."""

    def chunk(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Take what is wanted of ``[n, vocabulary]`` float32 logits, which may be overwritten; gives ``-log p``, ``[n]``.

        ``targets``: the true tokens, int64 ``[n]``, on the logits' device.
        """

    def end_window(self, window: Window) -> None:
        """All chunks of a window have been shown."""


class Likelihood:
    """The plainest watcher: nothing but the true tokens' log-probabilities."""

    def chunk(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``-log p`` of the targets."""
        return torch.logsumexp(logits, -1) - logits.gather(1, targets[:, None])[:, 0]

    def end_window(self, window: Window) -> None:
        """Nothing is kept."""


@torch.inference_mode()
def score(chunks: Chunks, windows: Iterable[Window], watcher: Watcher | None = None, label: str = "perplexity") -> float:
    """Sum of ``-log p`` over all scored tokens, in nats; NaN or infinite where a model diverged.

    Args:
        chunks: gives a window's float32 logits for its scored positions, in order, in pieces: :func:`chunked`.
        windows: of a :class:`eval.protocols.Plan`.
        watcher: sees every chunk; None: :class:`Likelihood`.
        label: of the progress bar.
    """
    watcher = watcher or Likelihood()
    total = 0.0
    for window in progress(list(windows), label):
        at = window.first
        for logits in chunks(window):
            targets = window.ids[at : at + len(logits)].to(logits.device)
            total += watcher.chunk(logits, targets).sum(dtype=torch.float64).item()
            at += len(logits)
        watcher.end_window(window)
    return total


def chunked(loaded: LoadedArtifact) -> Chunks:
    """A model's logits in pieces of at most 32 MiB.

    Where the consumer gives body and head apart, a first window's first tokens show whether together they are the model (some
    families scale or bound their logits behind the head); else all logits of a window are made at once, and cut.
    """
    tried: dict[str, int | bool] = {}

    def chunks(window: Window) -> Iterator[Tensor]:
        ids = window.ids[None, :-1]
        if not tried:
            # The model itself first: some consumers unpack codes on its first forward.
            whole = loaded.logits(ids[:, :_PROBED])[0].float()
            tried.update(apart=_is_split(loaded, ids[:, :_PROBED], whole), rows=rows_in_chunk(whole.shape[-1]))
        rows = tried["rows"]
        if not tried["apart"] or loaded.hidden is None or loaded.head is None:
            yield from (part.float() for part in loaded.logits(ids)[0, window.first - 1 :].split(rows))  # type: ignore[no-untyped-call]
            return
        for hidden in loaded.hidden(ids)[0, window.first - 1 :].split(rows):  # type: ignore[no-untyped-call]
            yield loaded.head(hidden).float()

    return chunks


def rows_in_chunk(vocabulary: int) -> int:
    """Positions whose float32 logits are made at once."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def _is_split(loaded: LoadedArtifact, ids: Tensor, whole: Tensor) -> bool:
    """Whether body and head together give the model's own logits, float32 ``[n, vocabulary]``."""
    if loaded.hidden is None or loaded.head is None:
        return False
    parts = loaded.head(loaded.hidden(ids)[0]).float()
    if parts.shape != whole.shape:
        return False
    bound = _TOLERANCE * float(whole.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return bool(torch.isclose(parts, whole, rtol=0.0, atol=max(bound, 1e-6), equal_nan=True).all())
