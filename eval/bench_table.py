"""The comparison's table, for the terminal and as Markdown: both print the same cells."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from eval.report import Json, describe, markdown_list, markdown_text, show_number, show_ratio

COLUMNS = ("method", "version", "bits", "group", "sym", "ppl", "to fp16", "seconds", "peak RSS (MiB)", "artifact (MB)")
_WORDS = 2  # leading columns that are not figures


def cells(row: Json, baseline: float | None) -> list[str]:
    """One row's cells, in the order of :data:`COLUMNS`; a row without a figure says why in the place of its perplexity."""
    ppl = row.get("ppl")
    done = row["status"] == "done"
    quality = (show_number(ppl, 3) if ppl is not None else "diverged") if done else row["outcome"]
    return [
        row["name"],
        row["version"] or "",
        str(row["bits"]),
        "" if row["group"] is None else str(row["group"]),
        {None: "", True: "yes", False: "no"}[row["symmetric"]],
        quality,
        show_ratio(ppl / baseline) if done and ppl is not None and baseline else "",
        show_number(row["seconds"], 1) if "seconds" in row else "",
        show_number(row["peak_rss_bytes"] / 2**20, 0) if "peak_rss_bytes" in row else "",
        show_number(row["size_bytes"] / 1e6, 1) if "size_bytes" in row else "",
    ]


def baseline_of(rows: Sequence[Json]) -> float | None:
    """The perplexity that ratios refer to: the unquantized row's."""
    return next((row.get("ppl") for row in rows if row["name"] == "fp16"), None)


def notes(rows: Sequence[Json]) -> dict[str, str]:
    """What the cells have no room for: a peer's own settings, who loaded it, and how far an unfinished row had come."""
    found: dict[str, str] = {}
    for row in rows:
        parts = [describe(row["settings"])] if row.get("settings") else []
        if row.get("versions", {}).keys() - {"quantize"}:
            parts.append("made with " + ", ".join(f"{name} {version}" for name, version in row["versions"].items()))
        if "consumer" in row:
            parts.append(f"loaded by {row['consumer']}, computed in {row['compute_dtype']}")
        if row.get("last"):
            parts.append(f"{row['outcome']}; last: {row['last'][:200]}")
        if parts:
            found[row["name"]] = "; ".join(parts)
    return found


def render_table(rows: Sequence[Json]) -> Table:
    """The rows for a terminal of 100 columns or more."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, show_edge=False)
    for index, title in enumerate(COLUMNS):
        table.add_column(Text(title.replace(" (", "\n(")), justify="left" if index < _WORDS else "right", overflow="fold")
    baseline = baseline_of(rows)
    for row in rows:
        table.add_row(*map(Text, cells(row, baseline)))
    return table


def render_markdown(
    rows: Sequence[Json], *, command: str, date: str, protocol: Json, environment: Json, title: str = "GPTQ side by side"
) -> str:
    """The rows as a page of documentation with everything that is needed to repeat them."""
    rule = [":---" if index < _WORDS else "---:" for index in range(len(COLUMNS))]
    baseline = baseline_of(rows)
    lines = [list(COLUMNS), rule, *([markdown_text(cell) for cell in cells(row, baseline)] for row in rows)]
    return page(lines, title=title, command=command, date=date, notes=notes(rows), protocol=protocol, environment=environment)


def page(
    lines: Sequence[Sequence[str]], *, title: str, command: str, date: str, notes: Json, protocol: Json, environment: Json
) -> str:
    """A bench's page: its table, line by line, and what the figures are of."""
    blocks = [
        f"# {title}",
        f"Written on {date} by one run of\n\n```sh\n{command}\n```",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        "## Notes",
        markdown_list(notes),
        "## Protocol",
        markdown_list(protocol),
        "## Machine and versions",
        markdown_list(environment),
    ]
    return "\n\n".join(blocks) + "\n"
