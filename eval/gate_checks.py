"""Holding an artifact's figures against limits: one check for each, its value, its limit and the outcome.

Figures are read from ``evaluation.json``, never measured here, and only where it belongs to the artifact's present bytes. A
limit on a figure that was not measured fails, and says which command measures it. ``ppl_ratio`` is over the named baseline's
perplexity, else over that of the model whose predictions the divergence was measured from.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass

from eval.figures import Subject, comparable, difference_of
from eval.tasks_scores import compare
from quantize.artifact import EVALUATION
from quantize.errors import InputError
from quantize.limits import GateConfig, set_limits

PASSED, FAILED, NOT_MEASURED = "passed", "failed", "not measured"
MINIMA = ("top1_agreement", "decode_ratio")
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Check:
    """One figure held against one limit.

    Attributes:
        name: the limit's key, with the task's name behind a dot; ``files`` and ``figures`` are not limits.
        value: what was measured, in the limit's unit; None where nothing was, or the model diverged.
        limit: None of ``files`` and ``figures``.
        outcome: :data:`PASSED`, :data:`FAILED` or :data:`NOT_MEASURED`, which fails the gate as well.
        detail: what a reader needs besides, such as how to measure it; may be empty.
    """

    name: str
    value: float | None
    limit: float | None
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one artifact.

    Attributes:
        artifact: its name.
        path: its directory, as it was given.
        fingerprint: as its manifest has it.
        baseline: the baseline's name; None without one.
        checks: in order: files, figures, then the limits.
    """

    artifact: str
    path: str
    fingerprint: str
    baseline: str | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.outcome == PASSED for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if check.outcome != PASSED]


def judge(subject: Subject, limits: GateConfig, baseline: Subject | None = None) -> Verdict:
    """Hold an artifact against limits.

    Raises:
        InputError: the baseline is not as it was exported, its figures are of other bytes, or they are of another protocol than
            the artifact's; or figures are malformed.
    """
    if baseline is not None:
        _check_baseline(baseline)
    checks = [_files(subject), *_figures(subject)]
    for name, limit in set_limits(limits).items():
        try:
            if name == "task_drop":
                checks += [_task(subject, baseline, task, allowed) for task, allowed in limit.items()]
            else:
                checks.append(_limited(name, limit, subject, baseline))
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            place = subject.path / EVALUATION
            raise InputError(
                f"{place} is malformed where gate.{name} reads it ({error!r}); measure the artifact again"
            ) from error
    named = baseline.name if baseline is not None else None
    return Verdict(subject.name, str(subject.path), subject.manifest["fingerprint"], named, tuple(checks))


def _check_baseline(baseline: Subject) -> None:
    if baseline.problems:
        raise InputError(f"baseline {baseline.path} is not as it was exported ({baseline.problems[0]}); export it again")
    if baseline.stale:
        raise InputError(f"baseline {baseline.path / EVALUATION} has figures of other bytes; {_measure(baseline)}")


def _files(subject: Subject) -> Check:
    if not subject.problems:
        return Check("files", None, None, PASSED, f"{len(subject.manifest['files'])} files are as they were exported")
    more = len(subject.problems) - _SHOWN_PROBLEMS
    told = [*subject.problems[:_SHOWN_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
    return Check("files", None, None, FAILED, "; ".join(told))


def _figures(subject: Subject) -> list[Check]:
    if subject.evaluation is None:
        return []
    if subject.stale:
        return [Check("figures", None, None, FAILED, f"{EVALUATION} was measured on other bytes; {_measure(subject)}")]
    return [Check("figures", None, None, PASSED, f"{EVALUATION} was measured on these bytes")]


def _limited(name: str, limit: float, subject: Subject, baseline: Subject | None) -> Check:
    if subject.problems:
        return Check(name, None, limit, NOT_MEASURED, "the files are not those that were measured")
    value, detail = _VALUES[name](name, subject, baseline)
    if value is None:
        return Check(name, None, limit, NOT_MEASURED, detail)
    within = value >= limit if name in MINIMA else value <= limit
    # A diverged model's figures are infinite or NaN; the latter is within no limit.
    return Check(name, value if math.isfinite(value) else None, limit, PASSED if within else FAILED, detail)


Found = tuple[float | None, str]


def _ppl_ratio(_: str, subject: Subject, baseline: Subject | None) -> Found:
    ours = subject.figures
    if "ppl" not in ours:
        return None, _measure(subject)
    if baseline is not None:
        theirs = baseline.figures
        if "ppl" not in theirs:
            return None, f"the baseline has no perplexity; {_measure(baseline)}"
        apart = difference_of(comparable(ours), comparable(theirs))
        if apart:
            raise InputError(
                f"{subject.path} and baseline {baseline.path} were measured by different protocols ({apart}), and such figures "
                "cannot be compared; measure one of them again"
            )
        reference, name = theirs["ppl"], baseline.name
    else:
        against = (ours.get("divergence") or {}).get("reference") or {}
        if "ppl" not in against:
            return None, "there is no perplexity to compare with; give --baseline ARTIFACT"
        reference, name = against["ppl"], str(against.get("name"))
    if ours["ppl"] is None or reference is None:
        return math.inf, "diverged" if ours["ppl"] is None else f"{name} diverged"
    return ours["ppl"] / reference, f"{ours['ppl']:.4g} over {reference:.4g} of {name}"


def _divergence(name: str, subject: Subject, _: Subject | None) -> Found:
    found = subject.figures.get("divergence")
    if not found or name not in found:
        return None, _measure(subject, "--reference FILE", "FILE is what --save-reference made of the unquantized model")
    reference = found.get("reference") or {}
    if reference.get("artifact_fingerprint") == subject.manifest["fingerprint"]:
        return None, "it was measured from the artifact's own predictions; save those of the unquantized model"
    detail = f"from {reference.get('name')}, {found['tokens']:,} tokens"
    # The model diverged: infinitely far from the baseline.
    return (math.inf, f"diverged; {detail}") if found[name] is None else (found[name], detail)


def _size(name: str, subject: Subject, baseline: Subject | None) -> Found:
    if name == "size_bytes":
        return subject.size_bytes, "weight files"
    if baseline is None:
        return None, "give --baseline ARTIFACT"
    return subject.size_bytes / baseline.size_bytes, f"weight files, over those of {baseline.name}"


def _memory(name: str, subject: Subject, baseline: Subject | None) -> Found:
    ours = subject.figures.get("peak_rss_bytes")
    if ours is None:
        return None, _measure(subject)
    if name == "peak_rss_bytes":
        return ours, "the consumer's process while loading"
    theirs = baseline.figures.get("peak_rss_bytes") if baseline is not None else None
    if baseline is None or theirs is None:
        return None, "give --baseline ARTIFACT" if baseline is None else f"the baseline's is missing; {_measure(baseline)}"
    return ours / theirs, f"the consumer's process while loading, over that of {baseline.name}"


def _decode(_: str, subject: Subject, baseline: Subject | None) -> Found:
    against = (subject.figures.get("speed") or {}).get("baseline")
    named = "BASELINE" if baseline is None else shlex.quote(str(baseline.path))
    command = f"measure it: python -m eval.latency {shlex.quote(str(subject.path))} --baseline {named} --record"
    if not against:
        return None, command
    if baseline is not None and against["artifact_fingerprint"] != baseline.manifest["fingerprint"]:
        return None, f"it was measured beside another artifact than the baseline; {command}"
    rate = subject.figures["speed"]["decode_tokens_per_second"]
    return against["decode_ratio"], f"{rate:.4g} tokens/s, over {against['decode_tokens_per_second']:.4g} of {against['name']}"


def _task(subject: Subject, baseline: Subject | None, task: str, limit: float) -> Check:
    """A loss counts where it is more than noise: then it must not be above the limit."""
    name, found = f"task_drop.{task}", (subject.figures.get("tasks") or {}).get(task)
    if subject.problems:
        return Check(name, None, limit, NOT_MEASURED, "the files are not those that were measured")
    measure = f"python -m eval.tasks {shlex.quote(str(subject.path))} --tasks {shlex.quote(task)} --record"
    if not found:
        return Check(name, None, limit, NOT_MEASURED, f"measure it: {measure}")
    change = found.get("difference")
    if baseline is not None:
        theirs = (baseline.figures.get("tasks") or {}).get(task)
        change = compare(found, theirs, name=task) if theirs else None
    if not change:
        return Check(name, None, limit, NOT_MEASURED, f"the baseline's score is missing; give --baseline, and {measure} for it")
    better = bool(found["metrics"][found["metric"]]["higher_is_better"])
    drop = -change["difference"] if better else change["difference"]
    noise = "within noise" if change["within_noise"] else f"p = {change['p_value']:.2g}"
    interval = f"{found['metric']} {change['difference']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}], {noise}"
    lost = drop > limit and not change["within_noise"]
    return Check(name, drop, limit, FAILED if lost else PASSED, f"{interval}, {change['samples']:,} items")


def _measure(subject: Subject, *options: str) -> str:
    command, note = [f"python -m eval.perplexity {shlex.quote(str(subject.path))}"], ""
    if options:
        command.append(options[0])
        note = f" ({options[1]})"
    return f"measure it: {' '.join([*command, '--record'])}{note}"


_VALUES = {
    "ppl_ratio": _ppl_ratio,
    "kld_mean": _divergence,
    "kld_p99": _divergence,
    "top1_agreement": _divergence,
    "size_bytes": _size,
    "size_ratio": _size,
    "peak_rss_bytes": _memory,
    "peak_rss_ratio": _memory,
    "decode_ratio": _decode,
}
