"""What a task gave, as JSON: figures, every item's score in a few bytes, and hashes that say what may be compared.

A task's entry, as :func:`entry` makes it and ``evaluation.json`` keeps it under the task's name::

    metric, value, stderr, samples     the task's first metric
    metrics: {name: {value, stderr, higher_is_better, scores}}
    parts: {task: {value, stderr, samples}}    of a name that stands for several tasks
    definition                         sha256 of the tasks' settings: prompts, metrics, versions
    items                              sha256 of the very questions asked, and of what is right
    versions, num_fewshot, limit, consumer, lm_eval

``scores`` is ``bits:`` or ``float32:`` and base64 of the items' scores in order. Two entries are compared only where
``definition`` and ``items`` are equal (:func:`compare`).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.bootstrap import paired_difference
from quantize.errors import InputError

Scores = NDArray[np.float64]
_BITS, _FLOATS = "bits", "float32"


def pack_scores(scores: Scores) -> str:
    """Items' scores as text: one bit each where all are 0 or 1, else 4 bytes, in base64."""
    if np.isin(scores, (0, 1)).all():
        data = len(scores).to_bytes(4, "little") + np.packbits(scores.astype(bool)).tobytes()
        return f"{_BITS}:{base64.b64encode(data).decode()}"
    return f"{_FLOATS}:{base64.b64encode(scores.astype('<f4').tobytes()).decode()}"


def unpack_scores(text: str) -> Scores:
    """The scores in :func:`pack_scores`'s text, ``[items]``.

    Raises:
        InputError: it is no such text.
    """
    kind, _, encoded = text.partition(":")
    try:
        data = base64.b64decode(encoded, validate=True)
        if kind == _FLOATS:
            return np.frombuffer(data, "<f4").astype(np.float64)
        count, bits = int.from_bytes(data[:4], "little"), np.frombuffer(data[4:], np.uint8)
        if kind == _BITS and len(data) == 4 + (count + 7) // 8:
            return np.unpackbits(bits, count=count).astype(np.float64)
    except (binascii.Error, ValueError):
        pass
    raise InputError(f"scores {text[:40]!r} are damaged; expected bits:BASE64 or float32:BASE64, as eval.tasks writes them")


def figure(scores: Scores) -> dict[str, Any]:
    """``value``, ``stderr`` (None of one item; with ``n - 1``, as lm-eval computes it) and ``samples`` of items' scores."""
    stderr = float(scores.std(ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else None
    return {"value": float(scores.mean()), "stderr": stderr, "samples": len(scores)}


def entry(metrics: Mapping[str, tuple[Scores, bool]], parts: Mapping[str, Scores], **described: Any) -> dict[str, Any]:
    """A task's entry.

    Args:
        metrics: for each metric, in the task's order, the items' scores and whether more is better; one at least.
        parts: the first metric's scores in each of several tasks, or nothing.
        described: the remaining fields.
    """
    first = next(iter(metrics))
    figures = {
        name: {key: value for key, value in figure(scores).items() if key != "samples"}
        | {"higher_is_better": better, "scores": pack_scores(scores)}
        for name, (scores, better) in metrics.items()
    }
    return {
        "metric": first,
        **figure(metrics[first][0]),
        "metrics": figures,
        "parts": {name: figure(scores) for name, scores in parts.items()},
        **described,
    }


def compare(variant: Mapping[str, Any], reference: Mapping[str, Any], *, name: str, seed: int = 0) -> dict[str, Any]:
    """How an entry's first metric differs from a reference's on the same items: a paired bootstrap's result.

    Args:
        variant: an entry.
        reference: an entry of the same task.
        name: of the task, for messages.
        seed: of the bootstrap.

    Returns:
        ``reference`` (its value), ``difference``, ``stderr``, ``low``, ``high``, ``p_value``, ``within_noise``, ``samples``,
        and ``flips_lost`` and ``flips_won``: items with a worse and a better score.

    Raises:
        InputError: the entries are of different definitions or items, or damaged.
    """
    try:
        ours, theirs = variant["definition"], reference["definition"]
        if ours != theirs:
            raise InputError(
                f"task {name}: the reference is of another definition of the task ({theirs[:12]}, not {ours[:12]}), and such "
                "figures cannot be compared; run both with the same task files and lm-eval"
            )
        if variant["items"] != reference["items"]:
            raise InputError(
                f"task {name}: the reference answered other items ({reference['samples']}; here {variant['samples']}); run "
                "both with the same data and --limit"
            )
        metric = variant["metric"]
        scores = [unpack_scores(each["metrics"][metric]["scores"]) for each in (variant, reference)]
        better = bool(variant["metrics"][metric]["higher_is_better"])
        value = float(reference["value"])
    except (KeyError, TypeError) as error:
        raise InputError(f"task {name}: no entry that eval.tasks writes ({error!r} is missing or wrong)") from error
    if len(scores[0]) != len(scores[1]):
        raise InputError(f"task {name}: {len(scores[0])} scores here, {len(scores[1])} in the reference; run both again")
    found = asdict(paired_difference(*scores, seed=seed))
    lost, won = found.pop("lost"), found.pop("won")
    return {"reference": value, **found, "flips_lost": lost if better else won, "flips_won": won if better else lost}


def with_differences(tasks: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries, each with ``difference`` to the reference's entry of that name (:func:`compare`).

    It is None where the reference lacks the task.

    Raises:
        InputError: a task's definition or items differ.
    """
    return {
        name: {**found, "difference": compare(found, reference[name], name=name) if name in reference else None}
        for name, found in tasks.items()
    }


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """An entry in brief, for tables: ``metric``, ``value``, ``stderr``, ``samples`` and ``difference``, None without one."""
    return {key: found.get(key) for key in ("metric", "value", "stderr", "samples", "difference")}


def described(found: Mapping[str, Any]) -> str:
    """What an entry's figure is, on one line: metric, number of items, and what measured it."""
    return f"lm-eval {found['lm_eval']}, {found['metric']} on {found['samples']:,} items, standard error behind it"


def sentence(name: str, found: Mapping[str, Any]) -> str:
    """An entry on one line: the figure, and how it differs from the reference where that is known."""
    stderr = "" if found["stderr"] is None else f" +- {found['stderr']:.4f}"
    text = f"{name}: {found['metric']} {found['value']:.4f}{stderr} on {found['samples']} items"
    if found.get("difference") is None:
        return text
    change = found["difference"]
    verdict = "within noise" if change["within_noise"] else f"p = {change['p_value']:.4f}"
    return (
        f"{text}; reference {change['reference']:.4f}, difference {change['difference']:+.4f} "
        f"[{change['low']:+.4f}, {change['high']:+.4f}], {verdict}; {change['flips_lost']} lost, {change['flips_won']} won"
    )
