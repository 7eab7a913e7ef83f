"""What a gate found, for people and for programs: terminal table, Markdown of a pull request, JUnit XML, JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from rich import box
from rich.table import Table
from rich.text import Text

from eval.gate_checks import FAILED, MINIMA, NOT_MEASURED, Check, Verdict

SCHEMA = 1
_MARKS = {FAILED: "❌ failed", NOT_MEASURED: "❌ not measured"}
_STYLES = {FAILED: "bold red", NOT_MEASURED: "bold yellow"}
_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SIGNIFICANT = 4


def show(name: str, value: float | None) -> str:
    """A figure or limit as people read it: sizes in MB (10^6 bytes), shares in per cent; a dash without one."""
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB"
    if name == "top1_agreement" or name.startswith("task_drop"):
        return f"{100 * value:.4g} %"
    return f"{value:.{_SIGNIFICANT}g}"


def show_limit(check: Check) -> str:
    """A limit with its direction: ``at most 0.05``."""
    if check.limit is None:
        return "-"
    return f"{'at least' if check.name in MINIMA else 'at most'} {show(check.name, check.limit)}"


def sentence(verdict: Verdict) -> str:
    """One line: ``int4-rtn: gate failed: kld_mean 0.4 (at most 0.1), files``."""
    if verdict.passed:
        return f"{verdict.artifact}: gate passed ({len(verdict.checks)} checks)"
    told = []
    for check in verdict.failed:
        value = check.outcome if check.value is None else show(check.name, check.value)
        told.append(f"{check.name} {value}" + (f" ({show_limit(check)})" if check.limit is not None else ""))
    return f"{verdict.artifact}: gate failed: {', '.join(told)}"


def render_table(verdict: Verdict) -> Table:
    """The checks as a terminal table."""
    against = f", against {verdict.baseline}" if verdict.baseline else ""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.title, table.title_justify, table.title_style = Text(f"gate of {verdict.artifact}{against}"), "left", "bold"
    table.add_column("check", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("limit", justify="right", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for check in verdict.checks:
        cells = [check.name, show(check.name, check.value), show_limit(check), check.outcome, check.detail]
        table.add_row(*(Text(_line(cell)) for cell in cells), style=_STYLES.get(check.outcome))
    return table


def render_markdown(verdicts: Sequence[Verdict]) -> str:
    """GitHub Markdown for a pull request: a heading and a table for each artifact."""
    blocks = []
    for verdict in verdicts:
        mark = "✅ passed" if verdict.passed else "❌ failed"
        against = f", against {_escape(verdict.baseline)}" if verdict.baseline else ""
        rows = ["| check | value | limit | result | detail |", "| :--- | ---: | ---: | :--- | :--- |"]
        for check in verdict.checks:
            result = _MARKS.get(check.outcome, "✅ passed")
            cells = [check.name, show(check.name, check.value), show_limit(check), result, check.detail]
            rows.append(f"| {' | '.join(_escape(cell) for cell in cells)} |")
        heading = f"### Gate of {_escape(verdict.artifact)}{against}: {mark}"
        blocks += [heading, "\n".join(rows), f"Artifact fingerprint: `{verdict.fingerprint}`"]
    return "\n\n".join(blocks) + "\n"


def render_junit(verdicts: Sequence[Verdict]) -> str:
    """JUnit XML as GitHub's and GitLab's readers take it: a suite for each artifact, a case for each check."""
    failures = sum(len(verdict.failed) for verdict in verdicts)
    total = sum(len(verdict.checks) for verdict in verdicts)
    root = ElementTree.Element("testsuites", name="quantize gate", tests=str(total), failures=str(failures), errors="0")
    for verdict in verdicts:
        name = _printable(verdict.artifact)
        counts = {"name": name, "tests": str(len(verdict.checks)), "failures": str(len(verdict.failed)), "errors": "0"}
        suite = ElementTree.SubElement(root, "testsuite", counts)
        for check in verdict.checks:
            case = ElementTree.SubElement(suite, "testcase", classname=f"gate.{name}", name=_printable(check.name), time="0")
            words = f"{show(check.name, check.value)}, {show_limit(check)}" if check.limit is not None else check.outcome
            detail = _printable(check.detail)
            if check.outcome == "passed":
                ElementTree.SubElement(case, "system-out").text = f"{words}; {detail}"
            else:
                attributes = {"message": _printable(f"{check.name}: {words}"), "type": check.outcome}
                ElementTree.SubElement(case, "failure", attributes).text = detail
    ElementTree.indent(root)
    written: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return written.decode() + "\n"


def as_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """JSON values: ``passed``, and under ``artifacts`` what each :class:`Verdict` and :class:`Check` holds."""
    artifacts = [
        {
            "artifact": verdict.artifact,
            "path": verdict.path,
            "fingerprint": verdict.fingerprint,
            "baseline": verdict.baseline,
            "passed": verdict.passed,
            "checks": [vars(check) for check in verdict.checks],
        }
        for verdict in verdicts
    ]
    return {"schema": SCHEMA, "passed": all(verdict.passed for verdict in verdicts), "artifacts": artifacts}


def from_json(value: Mapping[str, Any]) -> list[Verdict]:
    """The verdicts of :func:`as_json`."""
    return [
        Verdict(
            **{key: each[key] for key in ("artifact", "path", "fingerprint", "baseline")},
            checks=tuple(Check(**check) for check in each["checks"]),
        )
        for each in value["artifacts"]
    ]


def _line(text: str) -> str:
    return " ".join(_printable(text).split())


def _printable(text: str) -> str:
    """Text without the characters that XML cannot hold."""
    return _NO_XML.sub("\ufffd", text)


def _escape(text: str | None) -> str:
    """Text that Markdown shows as it is, in a table cell too."""
    return re.sub(r"([\\`*_\[\]<>&|~$#@])", r"\\\1", _line(text or ""))
