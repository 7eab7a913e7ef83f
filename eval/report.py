"""The honest table: what each variant weighs, how well it predicts and what it cost, as JSON, Markdown, HTML and PNG.

Every writer reads the same report, so the four files cannot disagree; none holds a date: equal results, equal bytes.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from eval.charts import model_name, pareto_front, render_chart
from eval.report_page import PAGE
from quantize.files import atomic_path, write_json, write_text

Json = Mapping[str, Any]
SCHEMA = 2
_FRONT = "Pareto front: no other variant is smaller or equal and better or equal, ties aside"
_NUM = ' class="num"'
_h = html.escape


@dataclass(frozen=True)
class VariantResult:
    """What was measured on one artifact, loaded back from disk.

    ``bits``: nominal bits of the quantized layers (4, 16). ``bits_per_weight``: everything counted, weight-file bits
    over parameters. ``compression``: baseline size over this size. ``ppl``: per-token perplexity; NaN or infinity says
    that the variant diverged. ``ppl_ratio``: over the baseline's, None without one. ``kld_mean``: divergence from the baseline,
    nats a token, and ``top1_agreement``: share of tokens where both find the same one likeliest, both None without one and for
    the baseline itself. ``tasks``: for each task what :func:`eval.tasks_scores.summary` gives. ``seconds``: wall time of
    quantize and export. ``consumer``: program and version that loaded the artifact. ``path``: the artifact, relative.
    ``command``: the shell command that measures ``ppl`` and the tasks again. ``gate``: ``passed`` or ``failed: ...``, None
    without limits.
    """

    name: str
    solver: str
    container: str
    bits: float
    bits_per_weight: float
    size_bytes: int
    compression: float
    peak_rss_bytes: int
    ppl: float
    ppl_ratio: float | None
    kld_mean: float | None
    top1_agreement: float | None
    seconds: float
    consumer: str
    path: str
    command: str
    tasks: Mapping[str, Json] = field(default_factory=dict)
    gate: str | None = None


def build_report(variants: Sequence[VariantResult], *, model: Json, protocol: Json, environment: Json) -> dict[str, Any]:
    """Gather results into the report: JSON values only, variants in the order given, ``pareto`` the front's names.

    ``ppl`` and ``ppl_ratio`` that are not finite become null. ``model`` should hold a ``name``.

    Raises:
        ValueError: no variants, two of one name, or a NaN or infinity anywhere else.
        TypeError: a value that JSON cannot hold.
    """
    names = [variant.name for variant in variants]
    if not names:
        raise ValueError("a report needs at least one variant")
    if len(set(names)) < len(names):
        raise ValueError(f"variant names must differ, got {names}")
    rows = [asdict(item) | {"ppl": _finite(item.ppl), "ppl_ratio": _finite(item.ppl_ratio)} for item in variants]
    report = {
        "schema": SCHEMA,
        "model": dict(model),
        "protocol": dict(protocol),
        "environment": dict(environment),
        "variants": rows,
        "pareto": pareto_front(rows),
    }
    # Through JSON and back: what is rendered is exactly what a reader of report.json gets.
    return dict(json.loads(json.dumps(report, allow_nan=False)))


def render_table(report: Json) -> Table:
    """The report as a terminal table: plain characters, meant for a console of 120 columns.

    Narrower ones fold the words (variant, consumer), never the figures.
    """
    caption = f"* {_FRONT}\nprotocol: {describe(_short(report['protocol']))}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, show_edge=False)
    table.caption, table.caption_justify, table.caption_style = Text(caption), "left", "dim"
    for column in _columns(report):
        heading = Text(column.title.replace(" (", "\n(").replace("/", "/\n").replace("compression", "compr."))
        justify: JustifyMethod = "right" if column.numeric else "left"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=column.numeric)
    for row in report["variants"]:
        cells = [Text(" ".join(column.text(row).split())) for column in _columns(report)]
        cells[0].append(" *" if row["name"] in report["pareto"] else "")
        table.add_row(*cells)
    return table


def write_report(report: Json, output_dir: Path) -> list[Path]:
    """Write report.json, report.md, report.html and report.png below ``output_dir``, each atomically; their paths.

    Everything is rendered before the first file is written.

    Raises:
        InputError: the disk is full, read-only or not ours to write to.
    """
    markdown, chart = render_markdown(report), render_chart(report)
    page = render_html(report, chart)
    paths = [output_dir / f"report.{suffix}" for suffix in ("json", "md", "html", "png")]
    write_json(paths[0], report)
    write_text(paths[1], markdown)
    write_text(paths[2], page)
    with atomic_path(paths[3]) as temporary:
        temporary.write_bytes(chart)
    return paths


def render_markdown(report: Json) -> str:
    """The report as GitHub Markdown; the chart is the relative image ``report.png``."""
    columns = _columns(report)
    rule = ["---:" if column.numeric else ":---" for column in columns]
    rows = []
    for row in report["variants"]:
        cells = [markdown_text(column.text(row)) for column in columns]
        cells[0] += " ★" if row["name"] in report["pareto"] else ""
        rows.append(cells)
    table = [f"| {' | '.join(cells)} |" for cells in ([markdown_text(column.title) for column in columns], rule, *rows)]
    blocks = [
        f"# Quantization report: {markdown_text(model_name(report))}",
        f"Model: {markdown_text(describe(report['model']))}",
    ]
    blocks += ["\n".join(table), f"★ {_FRONT}.", "![Artifact size against perplexity](report.png)"]
    blocks += ["## Protocol", markdown_list(report["protocol"]), "## How to reproduce"]
    for row in report["variants"]:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", row["command"])), default=0))
        blocks += [
            f"### {markdown_text(row['name'])}",
            markdown_text(_provenance(row)),
            f"{fence}sh\n{row['command']}\n{fence}",
        ]
    return "\n\n".join([*blocks, "## Environment", markdown_list(report["environment"])]) + "\n"


def render_html(report: Json, chart: bytes) -> str:
    """The report as one self-contained page; ``chart`` is the PNG to embed."""
    head = "".join(
        f'<th scope="col"{_NUM if column.numeric else ""}><button type="button">{_h(column.title)}</button></th>'
        for column in _columns(report)
    )
    commands = "".join(
        f"<h3>{_h(row['name'])}</h3><p>{_h(_provenance(row))}</p><pre><code>{_h(row['command'])}</code></pre>"
        for row in report["variants"]
    )
    return PAGE.substitute(
        name=_h(model_name(report)),
        model=_h(describe(report["model"])),
        head=head,
        rows="\n".join(_html_row(row, _columns(report), row["name"] in report["pareto"]) for row in report["variants"]),
        front=_h(_FRONT),
        chart=base64.b64encode(chart).decode("ascii"),
        protocol=_html_list(report["protocol"]),
        commands=commands,
        environment=_html_list(report["environment"]),
    )


def describe(values: Json) -> str:
    """A mapping on one line: ``window 1,024; stride 512; bos true``."""
    return "; ".join(f"{key} {_plain(value)}" for key, value in values.items())


class _Column(NamedTuple):
    title: str
    field: str
    show: Callable[[Any], str]
    numeric: bool = True
    task: str | None = None  # of the row's tasks

    def value(self, row: Json) -> Any:
        """What the column shows of a row; None where it was not measured."""
        return row["tasks"].get(self.task) if self.task is not None else row[self.field]

    def text(self, row: Json) -> str:
        """The cell."""
        return self.show(self.value(row))


def show_number(value: float, digits: int) -> str:
    """A figure as tables print it: thousands separated, absurd ones in powers of ten."""
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.2e}"


def show_ratio(value: float | None) -> str:
    """A ratio as tables print it: ``+6.07 %``, or ``n/a`` without one."""
    if value is None:
        return "n/a"
    return f"{100 * (value - 1):+.2f} %" if value < 1e3 else f"{100 * (value - 1):+.1e} %"


def show_divergence(value: float | None) -> str:
    """A divergence in nats as tables print it, to three figures: ``0.0212``; ``n/a`` without one."""
    if value is None:
        return "n/a"
    return f"{value:.1e}" if 0 < value < 1e-4 else f"{value:#.3g}"


def show_accuracy(found: Json | None) -> str:
    """A task's figure and standard error as tables print them: ``88.6 (1.4)``; with ``~`` where the change is within noise."""
    if found is None:
        return "n/a"
    stderr = "" if found["stderr"] is None else f" ({100 * found['stderr']:.1f})"
    same = found["difference"] is not None and found["difference"]["within_noise"]
    return f"{100 * found['value']:.1f}{stderr}{' ~' if same else ''}"


_COLUMNS = (
    _Column("variant", "name", str, numeric=False),
    _Column("bits", "bits", lambda bits: f"{bits:g}"),
    _Column("bits/weight", "bits_per_weight", lambda bits: f"{bits:.2f}"),
    _Column("size (MB)", "size_bytes", lambda size: show_number(size / 1e6, 1)),
    _Column("compression", "compression", lambda factor: f"{factor:.2f}x"),
    _Column("ppl", "ppl", lambda ppl: "diverged" if ppl is None else show_number(ppl, 2)),
    _Column("ratio", "ppl_ratio", show_ratio),
    _Column("KLD", "kld_mean", show_divergence),
    _Column("top-1", "top1_agreement", lambda share: "n/a" if share is None else f"{100 * share:.1f} %"),
    _Column("peak RSS (MiB)", "peak_rss_bytes", lambda size: show_number(size / 2**20, 0)),
    _Column("time (s)", "seconds", lambda seconds: show_number(seconds, 1)),
    _Column("consumer", "consumer", str, numeric=False),
)


def _columns(report: Json) -> list[_Column]:
    """The columns of a report: a task's stands where any variant has run it, the gate's where any had to pass it."""
    names = list(dict.fromkeys(task for row in report["variants"] for task in row["tasks"]))
    metrics = {task: found["metric"] for row in report["variants"] for task, found in row["tasks"].items()}
    place = 1 + [column.field for column in _COLUMNS].index("top1_agreement")
    tasks = [_Column(f"{name} ({metrics[name]} %)", "tasks", show_accuracy, task=name) for name in names]
    gate = [_Column("gate", "gate", lambda mark: mark or "-", numeric=False)]
    gated = any(row["gate"] is not None for row in report["variants"])
    return [*_COLUMNS[:place], *tasks, *_COLUMNS[place:], *(gate if gated else [])]


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _plain(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _provenance(row: Json) -> str:
    return f"{row['path']} (solver {row['solver']}, container {row['container']}, loaded by {row['consumer']})"


def _short(protocol: Json) -> Json:
    """A protocol without what only programs compare."""
    return {key: value for key, value in protocol.items() if key != "text_sha256"}


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line, in a table cell too."""
    return re.sub(r"([\\`*_\[\]<>&|~$])", r"\\\1", " ".join(text.split()))


def markdown_list(values: Json) -> str:
    """A mapping as a Markdown list."""
    return (
        "\n".join(f"- {markdown_text(key)}: {markdown_text(_plain(value))}" for key, value in values.items())
        or "(not recorded)"
    )


def _html_list(values: Json) -> str:
    return "".join(f"<dt>{_h(key)}</dt><dd>{_h(_plain(value))}</dd>" for key, value in values.items())


def _html_row(row: Json, columns: Sequence[_Column], on_front: bool) -> str:
    cells = []
    for column in columns:
        value = column.value(row)
        text = _h(column.text(row))
        if column.field == "name":
            mark = ' <span class="mark" title="Pareto front">★</span>' if on_front else ""
            cells.append(f'<th scope="row" data-value="{text}">{text}{mark}</th>')
        else:
            number = value["value"] if column.task is not None and value is not None else value
            sort_key = "" if number is None else _h(str(number))
            cells.append(f'<td{_NUM if column.numeric else ""} data-value="{sort_key}">{text}</td>')
    return f"<tr>{''.join(cells)}</tr>"
