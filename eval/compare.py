"""Finished artifacts in one table and one chart, whenever and wherever they were made.

    python -m eval.compare artifacts/gptq/variants/gptq artifacts/awq --png compare.png --markdown compare.md

Each argument is an artifact, a run's folder (all of its variants) or a folder with nothing but a run's ``report.json``. Figures
are read, not measured: of artifacts from ``evaluation.json``. Figures of different protocols are not put in one column: the
command refuses, or gives each a column of its own (``--by-protocol``). Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.charts import pareto_front, render_chart
from eval.compare_columns import Column, Row, columns_of
from eval.report import markdown_text, show_divergence, show_number, show_ratio
from quantize.artifact import EVALUATION, MANIFEST, read_evaluation, read_manifest
from quantize.atomic import atomic_path
from quantize.errors import InputError, one_line

SCHEMA = 1
_REPORT = "report.json"
_REPORT_ONLY = ("size", "peak RSS", "compute dtype", "divergence")  # of a report's protocol: not the perplexity's
_UNITS = {"peak RSS": "peak RSS (MiB)", "decode": "decode (tokens/s)"}


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Every artifact that the paths stand for, in their order, each under a name of its own.

    Raises:
        InputError: a path holds no artifact and no report, or figures are damaged or of other bytes.
    """
    rows = [row for path in paths for row in _rows(path)]
    counts = collections.Counter(row.name for row in rows)
    named = [_renamed(row, _longer(row)) if counts[row.name] > 1 else row for row in rows]
    counts = collections.Counter(row.name for row in named)
    named = [_renamed(row, row.path) if counts[row.name] > 1 else row for row in named]
    if len({row.name for row in named}) < len(named):
        twice = next(name for name, count in collections.Counter(row.name for row in named).items() if count > 1)
        raise InputError(f"{twice} is named twice; name each artifact once")
    return named


def _renamed(row: Row, name: str) -> Row:
    return Row(**{**vars(row), "name": name})


def _longer(row: Row) -> str:
    """``RUN/NAME``, with the run's folder above ``variants``."""
    parents = [part for part in Path(os.path.abspath(row.path)).parent.parts if part != "variants"]  # noqa: PTH100
    return f"{parents[-1]}/{row.name}" if parents else row.name


def _rows(path: Path) -> list[Row]:
    variants = sorted(file.parent for file in path.glob(f"variants/*/{MANIFEST}"))
    if variants:
        return [_artifact(variant) for variant in variants]
    if (path / _REPORT).is_file() or path.name == _REPORT:
        return _reported(path if path.name == _REPORT else path / _REPORT)
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path} is no artifact ({MANIFEST}) and no run's folder (variants/, {_REPORT}); name one")
    return [_artifact(path)]


def _artifact(path: Path) -> Row:
    manifest, figures = read_manifest(path), read_evaluation(path) or {}
    if figures and figures.get("artifact_fingerprint") != manifest["fingerprint"]:
        raise InputError(
            f"{path / EVALUATION} has figures of other bytes; measure it again with python -m eval.perplexity --record"
        )
    try:
        return Row(
            name=str(manifest["name"]),
            path=str(path),
            container=str(manifest["container"]),
            solver=str(manifest["solver"]["name"]),
            base=manifest["base"]["name"],
            bits_per_weight=float(manifest["bits_per_weight"]),
            size_bytes=int(manifest["size_bytes"]),
            figures=figures,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path / MANIFEST} is damaged ({error!r}); export the artifact again") from error


def _reported(path: Path) -> list[Row]:
    """The variants of a report. What their divergence was measured from is only known by its description."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        described = dict(report["protocol"])
        protocol = {key: value for key, value in described.items() if key not in _REPORT_ONLY and not isinstance(value, str)}
        protocol |= {key: described[key] for key in ("name", "text_sha256", "part", "text") if key in described}
        return [_reported_row(path, report, row, protocol) for row in report["variants"]]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged ({one_line(error)}); make the report again") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is no report that `python -m quantize` writes ({error!r}); make it again") from error


def _reported_row(path: Path, report: dict[str, Any], row: dict[str, Any], protocol: dict[str, Any]) -> Row:
    described = report["protocol"]
    figures: dict[str, Any] = {key: row[key] for key in ("ppl", "peak_rss_bytes")}
    figures |= {"protocol": protocol, "compute_dtype": described.get("compute dtype"), "divergence": None}
    if row.get("kld_mean") is not None:
        # The baseline's perplexity is that of the row whose ratio this one's is.
        against = row["ppl"] / row["ppl_ratio"] if row["ppl"] and row.get("ppl_ratio") else None
        reference: dict[str, Any] = {"ppl": against, "top_k": described.get("divergence")}
        figures["divergence"] = {"kld_mean": row["kld_mean"], "top1_agreement": row["top1_agreement"], "reference": reference}
    return Row(
        name=str(row["name"]),
        path=str(path.parent / row["path"]),
        container=str(row["container"]),
        solver=str(row["solver"]),
        base=report["model"].get("name"),
        bits_per_weight=float(row["bits_per_weight"]),
        size_bytes=int(row["size_bytes"]),
        figures=figures,
    )


def show(column: Column, row: Row) -> str:
    """A cell: ``-`` where nothing was measured."""
    if row.name not in column.values:
        return "-"
    value = column.values[row.name]
    if value is None:
        return "diverged"
    if column.figure.startswith("task "):
        stderr = row.figures["tasks"][column.figure.removeprefix("task ")]["stderr"]
        text = f"{100 * value:.1f}" + (f" ({100 * stderr:.1f})" if stderr is not None else "")
        return f"{text}, {column.notes[row.name]}" if row.name in column.notes else text
    shown = {
        "ppl": lambda: show_number(value, 3),
        "ratio": lambda: show_ratio(value),
        "KLD": lambda: show_divergence(value),
        "top-1": lambda: f"{100 * value:.1f} %",
        "peak RSS": lambda: show_number(value / 2**20, 0),
        "decode": lambda: show_number(value, 2),
    }
    return shown[column.figure]()


def _cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    titles = [
        _UNITS.get(column.title, f"{column.title} (%)" if column.figure[:5] == "task " else column.title) for column in columns
    ]
    head = ["artifact", "solver", "container", "bits/weight", "size (MB)", *titles]
    body = [
        [row.name, row.solver, row.container, f"{row.bits_per_weight:.2f}", show_number(row.size_bytes / 1e6, 1)]
        + [show(column, row) for column in columns]
        for row in rows
    ]
    return [head, *body]


def render_table(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """The comparison as a terminal table."""
    head, *body = _cells(rows, columns)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, title in enumerate(head):
        table.add_column(Text(title), justify="left" if number < 3 else "right", overflow="fold")
    for cells in body:
        table.add_row(*(Text(" ".join(cell.split())) for cell in cells))
    return table


def render_markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """The comparison as a GitHub Markdown table, and what each column's figures share."""
    head, *body = _cells(rows, columns)
    rule = [":---" if number < 3 else "---:" for number in range(len(head))]
    lines = [f"| {' | '.join(map(markdown_text, cells))} |" for cells in (head, *body)]
    lines.insert(1, f"| {' | '.join(rule)} |")
    shared = [
        f"- {markdown_text(column.title)}: {markdown_text('; '.join(f'{key} {value}' for key, value in column.key.items()))}"
        for column in columns
        if column.key
    ]
    return "\n".join([*lines, "", *shared]) + "\n"


def render_png(rows: Sequence[Row], columns: Sequence[Column]) -> bytes:
    """Size against perplexity; a panel for each protocol, one below the other.

    Raises:
        InputError: no perplexity was measured.
    """
    from matplotlib.image import imread, imsave

    panels = []
    for column in columns:
        if column.figure != "ppl":
            continue
        shown = [row for row in rows if row.name in column.values]
        variants = [{"name": row.name, "size_bytes": row.size_bytes, "ppl": column.values[row.name]} for row in shown]
        bases = ", ".join(dict.fromkeys(row.base for row in shown if row.base)) or "artifacts"
        name = f"{bases} {column.title.removeprefix('ppl').strip()}".strip()
        panels.append(render_chart({"model": {"name": name}, "variants": variants, "pareto": pareto_front(variants)}))
    if not panels:
        raise InputError("--png draws perplexities, and no artifact has one; measure with python -m eval.perplexity --record")
    if len(panels) == 1:
        return panels[0]
    buffer = io.BytesIO()
    stacked = np.vstack([imread(io.BytesIO(panel), format="png") for panel in panels])
    unstamped: Any = {"Software": None}  # equal comparisons give equal bytes
    imsave(buffer, stacked, format="png", metadata=unstamped)
    return buffer.getvalue()


def as_json(rows: Sequence[Row], columns: Sequence[Column]) -> dict[str, Any]:
    """JSON values: ``artifacts`` with what they are, ``columns`` with key and values."""
    kept = ("name", "path", "container", "solver", "base", "bits_per_weight", "size_bytes")
    return {
        "schema": SCHEMA,
        "artifacts": [{key: getattr(row, key) for key in kept} for row in rows],
        "columns": [{**vars(column), "key": dict(column.key)} for column in columns],
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        rows = read_rows(options.artifacts)
        columns = _columns(rows, options.by_protocol)
        outputs = []
        if options.json:
            outputs.append((options.json, (json.dumps(as_json(rows, columns), indent=2, allow_nan=False) + "\n").encode()))
        if options.markdown:
            outputs.append((options.markdown, render_markdown(rows, columns).encode()))
        if options.png:
            outputs.append((options.png, render_png(rows, columns)))
        for path, content in outputs:
            with atomic_path(path) as temporary:
                temporary.write_bytes(content)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    # Piped output has no width of its own.
    Console(width=None if sys.stdout.isatty() else 180).print(render_table(rows, columns))
    return 0


def _columns(rows: Sequence[Row], by_protocol: bool) -> list[Column]:
    try:
        return columns_of(rows, by_protocol=by_protocol)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"an {EVALUATION} is malformed ({error!r}); measure the artifact again") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.compare", description="Finished artifacts in one table and chart.")
    parser.add_argument("artifacts", type=Path, nargs="+", help="artifacts, runs' folders or folders with a report.json")
    parser.add_argument("--by-protocol", action="store_true", help="a column for each protocol instead of refusing")
    parser.add_argument("--png", type=Path, help="draw size against perplexity into this file")
    parser.add_argument("--markdown", type=Path, help="write a Markdown table to this file")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
