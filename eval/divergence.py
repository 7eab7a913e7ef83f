"""How far an artifact's predictions are from those of the model it was made from, token by token.

Let P be the reference's distribution of a token and Q the artifact's. The vocabulary is divided into the reference's ``k``
likeliest tokens, one by one, and all others as one::

    KL = sum over the k tokens of p (log p - log q)  +  p_rest (log p_rest - log q_rest)

By the log-sum inequality this is at most the divergence over the whole vocabulary, sum of p (log p - log q), and equal to it
where Q divides the rest as P does: a lower bound, whose distance shrinks with the mass in the rest (which is reported). Figures
of different ``top_k`` are therefore not compared. Nats throughout.

A flip is a token of the text that one of the two models finds likeliest and the other does not: ``flips_lost`` the reference
alone had right, ``flips_won`` the artifact alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.protocols import Window
from eval.reference import Reference, Top, partition
from quantize.errors import InputError

_BUCKETS = 8  # of positions in a window


def kl_divergence(reference: Top, artifact: Top) -> Tensor:
    """The divergence of each position, ``[n]``, as the module defines it; never negative.

    Both are partitions of the same tokens (``artifact.ids`` are ``reference.ids``). NaN where the artifact diverged.
    """
    p = reference.logp.double()
    inside = (p.exp() * (p - artifact.logp.double())).sum(-1)
    rest = reference.rest.double()
    # A remainder of nothing (all of the vocabulary is among the k) adds nothing, though its logarithm is infinite.
    outside = torch.where(torch.isneginf(rest), 0.0, rest.exp() * (rest - artifact.rest.double()))
    return (inside + outside).clamp(min=0.0)


class Comparison:
    """A watcher that compares an artifact's logits with a stored reference."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._number, self._at = 0, 0
        self._top: Top | None = None
        self._kld: list[NDArray[np.float64]] = []
        self._places: list[NDArray[np.float64]] = []
        self._counts = {"same": 0, "lost": 0, "won": 0}
        self._agreed: list[NDArray[np.bool_]] = []
        self._base_nll = self._rest = 0.0

    def chunk(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compare some positions; ``-log p`` of the targets under the artifact.

        Raises:
            InputError: the vocabularies differ, or the reference has no such positions.
        """
        if logits.shape[-1] != self._reference.meta["vocabulary"]:
            raise InputError(
                f"{self._reference.path} has a vocabulary of {self._reference.meta['vocabulary']} words, and the artifact "
                f"{logits.shape[-1]}; compare with the model it was made from, or not at all (eval.divergence=false)"
            )
        if self._top is None:
            self._top = self._reference.window(self._number, logits.device)
        rows = slice(self._at, self._at + len(targets))
        reference = Top(*(values[rows] for values in self._top))
        if len(reference.rest) != len(targets):
            raise InputError(f"{self._reference.path} lacks positions of window {self._number}; make it again")
        self._at += len(targets)
        best, wanted = logits.argmax(-1), reference.ids[:, 0]
        found = partition(logits, reference.ids, targets)
        self._kld.append(kl_divergence(reference, found).cpu().numpy())
        self._agreed.append((best == wanted).cpu().numpy())
        right, was_right = best == targets, wanted == targets
        self._counts["lost"] += int((was_right & ~right).sum())
        self._counts["won"] += int((right & ~was_right).sum())
        self._base_nll -= float(reference.true.double().sum())
        self._rest += float(reference.rest.double().exp().sum())
        return -found.true

    def end_window(self, window: Window) -> None:
        """Go on to the reference's next window."""
        # Where in its window a token stands, from 0 to below 1: the tokens in front of it are its context.
        self._places.append(np.arange(window.first, len(window.ids)) / len(window.ids))
        self._number, self._at, self._top = self._number + 1, 0, None

    def result(self) -> dict[str, Any]:
        """The figures, JSON values: None where the artifact diverged. See the module."""
        kld, agreed = np.concatenate(self._kld), np.concatenate(self._agreed)
        places, meta, count = np.concatenate(self._places), self._reference.meta, len(kld)
        median, p99 = np.percentile(kld, [50, 99])
        error = float(kld.std(ddof=1) / math.sqrt(count)) if count > 1 else math.nan
        return {
            "kld_mean": _finite(kld.mean()),
            "kld_mean_stderr": _finite(error),
            "kld_median": _finite(median),
            "kld_p99": _finite(p99),
            "kld_max": _finite(kld.max()),
            "top1_agreement": float(agreed.mean()),
            "flips_lost": self._counts["lost"],
            "flips_won": self._counts["won"],
            "tokens": count,
            "per_position": _per_position(places, kld, agreed),
            "reference": {
                "artifact_fingerprint": meta.get("artifact_fingerprint"),
                "name": meta.get("name"),
                "ppl": _finite(math.exp(min(self._base_nll / count, 700.0))),
                "top_k": meta["top_k"],
                "rest_mass": self._rest / count,
                "tokens_sha256": meta["tokens_sha256"],
            },
        }


def _per_position(places: NDArray[np.float64], kld: NDArray[np.float64], agreed: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Means over equal parts of a window, as far as tokens were scored there."""
    parts = np.minimum((places * _BUCKETS).astype(int), _BUCKETS - 1)
    return [
        {
            "from": part / _BUCKETS,
            "to": (part + 1) / _BUCKETS,
            "tokens": int((parts == part).sum()),
            "kld_mean": _finite(kld[parts == part].mean()),
            "top1_agreement": float(agreed[parts == part].mean()),
        }
        for part in range(_BUCKETS)
        if (parts == part).any()
    ]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
