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


@torch.inference_mode()
def likelihood(loaded: LoadedArtifact, windows: Iterable[Window], label: str = "perplexity") -> float:
    """:func:`score` where nothing else is wanted of the logits: sum of ``-log p`` over all scored tokens, in nats.

    Where the output embedding is a plain matrix, a slice of the vocabulary at a time is made for all positions of a window, in
    memory that is used again: the matrix is read once a window, and the logits never leave the processor's cache for long.
    """
    shown, weight, hidden = list(windows), loaded.head_weight, loaded.hidden
    probe = shown[0].ids[None, :-1][:, :_PROBED] if shown else None
    if weight is None or hidden is None or probe is None or not _is_split(loaded, probe, loaded.logits(probe)[0].float()):
        return score(chunked(loaded), shown, label=label)
    total, buffer = 0.0, weight.new_empty(CHUNK_BYTES // 8)  # half of a chunk, in float32
    for window in progress(shown, label):
        rows = hidden(window.ids[None, :-1])[0, window.first - 1 :]
        targets = window.ids[window.first :].to(weight.device)
        true = (rows.float() * weight[targets].float()).sum(-1)
        total += (_normaliser(rows, weight, buffer) - true).sum(dtype=torch.float64).item()
    return total


def _normaliser(rows: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """Logarithm of the sum of ``exp(logit)`` over the vocabulary for each row, float32 ``[n]``."""
    columns = max(1, buffer.numel() // len(rows))
    found = torch.full((len(rows),), -torch.inf, device=weight.device)
    for low in range(0, len(weight), columns):
        part = weight[low : low + columns]
        logits = torch.mm(rows, part.t(), out=buffer[: len(rows) * len(part)].view(len(rows), len(part)))
        found = torch.logaddexp(found, torch.logsumexp(logits.float(), -1))
    return found


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
