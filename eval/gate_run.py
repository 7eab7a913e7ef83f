"""The gate as a stage of a run: a variant's verdict, and the files that a run leaves of all of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.figures import read_subject
from eval.gate_checks import judge
from eval.gate_output import as_json, from_json, render_junit, render_markdown, sentence
from quantize.atomic import atomic_path
from quantize.limits import GateConfig

_FILES = ("gate.json", "gate.md", "gate.xml")


def judge_variant(artifact: Path, limits: GateConfig, baseline: Path | None, *, run: Path) -> dict[str, Any]:
    """The verdict on an artifact of a run, as JSON values (:func:`eval.gate_output.as_json`), its path relative to the run.

    Raises:
        InputError: as :func:`eval.gate_checks.judge`.
    """
    verdict = judge(read_subject(artifact), limits, read_subject(baseline) if baseline is not None else None)
    verdict = dataclasses.replace(verdict, path=artifact.relative_to(run).as_posix())
    return as_json([verdict])


def write_verdicts(results: Sequence[Mapping[str, Any]], directory: Path) -> list[Path]:
    """Write ``gate.json``, ``gate.md`` and ``gate.xml`` (JUnit) of all results of :func:`judge_variant`; their paths."""
    verdicts = [verdict for result in results for verdict in from_json(result)]
    contents = (
        json.dumps(as_json(verdicts), indent=2, allow_nan=False) + "\n",
        render_markdown(verdicts),
        render_junit(verdicts),
    )
    paths = [directory / name for name in _FILES]
    for path, text in zip(paths, contents, strict=True):
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths


def remove_verdicts(directory: Path) -> None:
    """Remove what :func:`write_verdicts` once wrote: a run without limits has no verdict."""
    for name in _FILES:
        (directory / name).unlink(missing_ok=True)


def failures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on each result that did not pass."""
    return [sentence(verdict) for result in results for verdict in from_json(result) if not verdict.passed]


def mark(result: Mapping[str, Any]) -> str:
    """What the report says of a result: ``passed``, or ``failed: kld_mean, files``."""
    failed = [check.name for verdict in from_json(result) for check in verdict.failed]
    return f"failed: {', '.join(failed)}" if failed else "passed"
