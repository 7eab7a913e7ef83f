"""The comparison of GGUF files as a table, for the terminal and as Markdown: both print the same cells."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from eval.bench_table import page
from eval.report import Json, markdown_text, show_number, show_ratio

COLUMNS = ("file", "size (MB)", "bits/weight", "ppl", "to f16", "mean KLD", "same top", "seconds", "tokens/s")


def cells(row: Json, baseline: float | None) -> list[str]:
    """One row's cells, in the order of :data:`COLUMNS`; a row without figures says why in the place of its perplexity."""
    if row["status"] != "done":
        return [row["name"], "", "", row["outcome"], *[""] * (len(COLUMNS) - 4)]
    return [
        row["name"],
        show_number(row["size_bytes"] / 1e6, 1),
        f"{row['bits_per_weight']:.2f}",
        f"{show_number(row['ppl'], 3)} ± {show_number(row['ppl_error'], 2)}",
        show_ratio(row["ppl"] / baseline) if baseline else "",
        show_number(row["kld"], 4) if "kld" in row else "",
        f"{100 * row['same_top']:.2f} %" if "same_top" in row else "",
        show_number(row["seconds"], 1),
        show_number(row["generation_speed"], 1),
    ]


def baseline_of(rows: Sequence[Json]) -> float | None:
    """The perplexity that ratios refer to: the unquantized row's."""
    return next((row.get("ppl") for row in rows if row["name"] == "f16"), None)


def notes(rows: Sequence[Json]) -> dict[str, str]:
    """What the cells have no room for: how each file was made, and how a row failed."""
    return {row["name"]: "; ".join(filter(None, [_made(row), row.get("last", "")[:400]])) for row in rows}


def _made(row: Json) -> str:
    if row["recipe"]:
        return " ".join(["python -m quantize", f"recipe={row['recipe']}", *row["settings"]])
    if row["kind"] is None:
        return "the checkpoint, converted"
    pure = " --pure" if row["pure"] else ""
    by = {"llama.cpp": "llama-imatrix", "ours": "python -m calibration.imatrix"}
    return f"llama-quantize{pure} {row['kind']}" + (f" with the imatrix of {by[row['imatrix']]}" if row["imatrix"] else "")


def render_table(rows: Sequence[Json]) -> Table:
    """The rows for a terminal of 100 columns or more."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, show_edge=False)
    for index, title in enumerate(COLUMNS):
        table.add_column(Text(title.replace(" (", "\n(")), justify="right" if index else "left", overflow="fold")
    baseline = baseline_of(rows)
    for row in rows:
        table.add_row(*map(Text, cells(row, baseline)))
    return table


def render_markdown(rows: Sequence[Json], *, command: str, date: str, protocol: Json, environment: Json) -> str:
    """The rows as a page of documentation with everything that is needed to repeat them."""
    rule = ["---:" if index else ":---" for index in range(len(COLUMNS))]
    baseline = baseline_of(rows)
    lines = [list(COLUMNS), rule, *([markdown_text(cell) for cell in cells(row, baseline)] for row in rows)]
    settings = {"title": "GGUF side by side", "command": command, "date": date}
    return page(lines, **settings, notes=notes(rows), protocol=protocol, environment=environment)
