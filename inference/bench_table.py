"""Every idea of the engine as a measured ratio: ``python -m inference.bench_table`` (``make bench-inference``).

Prints the table, writes it into docs/inference.md, and figures, rounds and plots to ``artifacts/inference-bench``. The two
sides of a ratio are measured in turns, round by round, in one process, and the figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from inference import bench_compile, bench_decode, bench_kv, bench_serving
from inference.bench_cases import Bench, LeftOut, Row
from quantize.demo_model import demo_model
from quantize.errors import InputError
from quantize.files import atomic_path, write_json, write_text

CASES: dict[str, Callable[[Bench], Row | list[Row]]] = {
    "cache": bench_decode.cache_against_none,
    "native": bench_decode.native_against_torch,
    "transformers": bench_decode.against_transformers,
    "int8": bench_decode.int8_against_fp32,
    "llamacpp": bench_decode.against_llamacpp,
    "roofline": bench_decode.roofline,
    "compile": bench_compile.compiled_against_eager,
    "static": bench_serving.static_eight,
    "continuous": bench_serving.against_static,
    "prefix": bench_serving.shared_prompt,
    "kv-int8": bench_kv.int8_cache,
    "speculative": bench_decode.speculative,
}
BEGIN, END = "<!-- bench-inference: written by `make bench-inference` -->", "<!-- /bench-inference -->"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "inference.md"


def measure(bench: Bench, names: Sequence[str], say: Callable[[str], None]) -> tuple[list[Row], list[str]]:
    """The rows of the named cases, said as they come, and why others are missing."""
    rows: list[Row] = []
    missing: list[str] = []
    for name in names:
        say(f"measuring {name}")
        try:
            found = CASES[name](bench)
        except LeftOut as reason:
            missing.append(str(reason))
            continue
        for row in found if isinstance(found, list) else [found]:
            say(" | ".join(cells(row)))
            rows.append(row)
    return rows, missing


def cells(row: Row) -> list[str]:
    """Title, goal, figure, its range over the rounds, whether the goal is reached, and what was run."""
    sign = ">=" if row.at_least else "<="
    goal = "" if row.goal is None else f"{sign} {row.goal:g}{row.unit}"
    verdict = {None: "", True: "yes", False: "no"}[row.reached]
    spread = f"{min(row.values):.2f}-{max(row.values):.2f}"
    return [row.title, goal, f"{row.value:.2f}{row.unit}", spread, verdict, row.detail]


HEADINGS = ("", "goal", "measured", "range", "reached", "what was run")


def markdown(rows: Sequence[Row], missing: Sequence[str], command: str, machine: dict[str, Any]) -> str:
    """The section of docs/inference.md, markers included."""
    lines = ["| " + " | ".join(line) + " |" for line in (HEADINGS, ["---"] * len(HEADINGS), *map(cells, rows))]
    parts = [
        BEGIN,
        f"Written on {machine['date']} by `{command}`; "
        + ", ".join(f"{key} {machine[key]}" for key in ("processor", "threads", "torch"))
        + ".",
        "\n".join(lines),
        *([f"Left out: {'; '.join(missing)}."] if missing else []),
        END,
    ]
    return "\n\n".join(parts)


def replace_section(page: str, section: str) -> str:
    """``page`` with the text between the markers replaced, or the section added at its end.

    Raises:
        InputError: one marker without the other.
    """
    if (BEGIN in page) != (END in page):
        raise InputError(f"{PAGE} has one of the markers {BEGIN} and {END}; give it both or none")
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{section}\n"
    before, _, rest = page.partition(BEGIN)
    return before + section + rest.partition(END)[2]


def plot(rows: Sequence[Row]) -> bytes:
    """Each figure over its goal, as PNG; right of 1 is reached."""
    goals = [row for row in rows if row.goal is not None]
    figure = Figure(figsize=(9, 0.5 * len(goals) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # Where less is better the quotient is turned round, so that the right side is the good one in every bar.
    shares = [row.value / row.goal if row.at_least else row.goal / row.value for row in goals if row.goal and row.value]
    axes.barh(
        [row.title for row in goals if row.goal and row.value],
        shares,
        color=["#2a7" if share >= 1 else "#c63" for share in shares],
    )
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("measured / goal")
    out = BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def machine() -> dict[str, Any]:
    """What the figures are of."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, "processor": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m inference.bench_table", description=__doc__)
    parser.add_argument("--model", type=Path, help="an unquantized model's directory; the demo model by default")
    parser.add_argument("--output", type=Path, default=Path("artifacts/inference-bench"), help="where files go")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose table is replaced")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="some rows; the page is left alone then")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--requests", type=int, default=64, help="of the trace")
    parser.add_argument("--batch", type=int, default=16, help="sequences at a time in it")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    try:
        for key in ("rounds", "prompt", "tokens", "requests", "batch"):
            if getattr(options, key) < 1:
                raise InputError(f"--{key}={getattr(options, key)} measures nothing; use 1 or more")
        model = options.model or demo_model()
        bench = Bench(model, options.output, options.rounds, options.prompt, options.tokens, options.requests, options.batch)
        rows, missing = measure(bench, options.only, console.log)
        command = shlex.join(["python", "-m", "inference.bench_table", *arguments])
        about = machine()
        if options.only == list(CASES):
            write_text(options.page, replace_section(options.page.read_text(), markdown(rows, missing, command, about)))
        options.output.mkdir(parents=True, exist_ok=True)
        entries = {"command": command, "machine": about, "rows": [row.entry() for row in rows], "left_out": missing}
        write_json(options.output / "bench.json", entries)
        with atomic_path(options.output / "bench.png") as file:
            file.write_bytes(plot(rows))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    for reason in missing:
        console.print(f"left out: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
