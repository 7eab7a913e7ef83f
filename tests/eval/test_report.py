"""The report: exact JSON, an honest Pareto front, and renderings that survive hostile names and broken variants."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from eval import charts
from eval.charts import axis_limits, pareto_front, render_chart, staircase
from eval.report import VariantResult, build_report, render_html, render_markdown, render_table, write_report

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MODEL = {"name": "SmolLM2-135M", "parameters": 134_515_008, "path": "models/smollm2"}
PROTOCOL = {"text": "wikitext-2-raw test", "window": 1024, "stride": 512, "bos": True, "dtype": "float32"}
ENVIRONMENT = {"torch": "2.9.0", "threads": 2}


def variant(name: str, megabytes: float = 114.6, ppl: float = 26.0, **changes: Any) -> VariantResult:
    result = VariantResult(
        name=name,
        solver="gptq",
        container="safetensors",
        bits=4,
        bits_per_weight=megabytes * 8 / 134.515,
        size_bytes=round(megabytes * 1e6),
        compression=269.1 / megabytes,
        peak_rss_bytes=1234 * 2**20,
        ppl=ppl,
        ppl_ratio=ppl / 22.55,
        kld_mean=0.0212,
        top1_agreement=0.931,
        seconds=312.7,
        consumer="transformers 5.23.0 + gptqmodel 7.6.0",
        path=f"artifacts/{name}",
        command=f"evaluate artifacts/{name}",
    )
    return dataclasses.replace(result, **changes)


def sample() -> list[VariantResult]:
    return [
        variant("fp16", 269.1, 22.55, bits=16),
        variant("int8", 164.0, 22.6, bits=8),
        variant("int4-rtn", 114.6, 31.2),
        variant("int4-gptq", 114.6, 26.0),
    ]


def report_of(variants: list[VariantResult], **changes: Any) -> dict[str, Any]:
    return build_report(variants, **({"model": MODEL, "protocol": PROTOCOL, "environment": ENVIRONMENT} | changes))


def printed(report: dict[str, Any], width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(render_table(report))
    return stream.getvalue()


def test_json_holds_exactly_the_documented_fields(tmp_path: Path) -> None:
    variants = sample()
    report = report_of(variants)
    paths = write_report(report, tmp_path / "out")
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html", "report.png"]
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)
    assert json.loads(paths[0].read_text()) == {
        "schema": 2,
        "model": MODEL,
        "protocol": PROTOCOL,
        "environment": ENVIRONMENT,
        "variants": [dataclasses.asdict(item) for item in variants],
        "pareto": ["fp16", "int8", "int4-gptq"],
    }


def test_a_report_read_back_renders_the_same(tmp_path: Path) -> None:
    report = report_of(sample())
    again = json.loads(write_report(report, tmp_path)[0].read_text())
    assert render_markdown(again) == render_markdown(report)
    assert printed(again) == printed(report)


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    first = write_report(report_of(sample()), tmp_path / "first")
    second = write_report(report_of(sample()), tmp_path / "second")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    png = first[3].read_bytes()
    assert png.startswith(PNG_SIGNATURE)
    assert not any(chunk in png for chunk in (b"tEXt", b"iTXt", b"zTXt", b"tIME"))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_diverged_variant_is_null_and_named(tmp_path: Path, broken: float) -> None:
    report = report_of([*sample(), variant("int2", 60.0, broken)])
    row = report["variants"][-1]
    assert row["ppl"] is None
    assert row["ppl_ratio"] is None
    assert "int2" not in report["pareto"]
    paths = write_report(report, tmp_path)
    json.loads(paths[0].read_text(), parse_constant=lambda constant: pytest.fail(f"{constant} in the JSON"))
    assert "| int2 | 4 | 3.57 | 60.0 | 4.49x | diverged | n/a |" in paths[1].read_text()
    assert '<td class="num" data-value="">diverged</td>' in paths[2].read_text()
    assert "diverged" in printed(report)


def test_a_run_of_nothing_but_diverged_variants_still_reports(tmp_path: Path) -> None:
    report = report_of([variant("int2", 60.0, math.nan)])
    assert report["pareto"] == []
    assert write_report(report, tmp_path)[3].read_bytes().startswith(PNG_SIGNATURE)


def test_without_a_baseline_there_is_no_ratio() -> None:
    report = report_of([variant("int4", ppl_ratio=None)])
    assert report["variants"][0]["ppl_ratio"] is None
    assert re.search(r"26\.00 +n/a", printed(report))


@pytest.mark.parametrize(
    ("variants", "protocol", "message"),
    [
        ([], PROTOCOL, "at least one"),
        ([variant("same"), variant("same")], PROTOCOL, "must differ"),
        ([variant("slow", seconds=math.inf)], PROTOCOL, "JSON"),
        ([variant("fine")], {"damping": math.nan}, "JSON"),
    ],
)
def test_what_cannot_be_reported_is_refused(variants: list[VariantResult], protocol: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report_of(variants, protocol=protocol)


def beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    no_worse = bool(one["size_bytes"] <= other["size_bytes"] and one["ppl"] <= other["ppl"])
    return no_worse and bool(one["size_bytes"] < other["size_bytes"] or one["ppl"] < other["ppl"])


# Few distinct values, so that ties in one or both coordinates are common.
@given(st.lists(st.tuples(st.integers(1, 6), st.one_of(st.none(), st.sampled_from([10.0, 10.5, 11.0, 30.0])))))
def test_the_front_is_exactly_the_undominated(pairs: list[tuple[int, float | None]]) -> None:
    rows = [{"name": str(i), "size_bytes": size, "ppl": ppl} for i, (size, ppl) in enumerate(pairs)]
    front = pareto_front(rows)
    alive = [row for row in rows if row["ppl"] is not None]
    assert set(front) <= {row["name"] for row in alive}
    for row in alive:
        assert (row["name"] in front) != any(beats(other, row) for other in alive)


def test_the_staircase_takes_the_worse_corner() -> None:
    assert staircase([(3.0, 1.0), (1.0, 5.0)]) == [(1.0, 5.0), (3.0, 5.0), (3.0, 1.0)]
    assert staircase([(1.0, 5.0)]) == [(1.0, 5.0)]
    assert staircase([]) == []


@pytest.mark.parametrize(("values", "log"), [([5.0], False), ([0.0], False), ([2.0, 2.0001], False), ([1, 1e9], True)])
def test_axis_limits_leave_room_and_never_collapse(values: list[float], log: bool) -> None:
    low, high = axis_limits(values, log=log)
    assert low < min(values) <= max(values) < high
    assert not log or low > 0


@pytest.mark.parametrize(
    "variants",
    [
        pytest.param([variant("only")], id="single"),
        pytest.param([variant(f"same-{i}") for i in range(8)], id="coincident"),
        pytest.param([*sample(), variant("int2", 60.0, 4e4)], id="wide range"),
        pytest.param([*sample(), variant("int2", 60.0, 1e200)], id="absurd range"),
        pytest.param([variant("$x_{$ \n " + "long " * 40)], id="hostile name"),
    ],
)
def test_any_results_can_be_drawn(variants: list[VariantResult]) -> None:
    assert render_chart(report_of(variants)).startswith(PNG_SIGNATURE)


@pytest.mark.parametrize("step", [0.0, 0.3, 1.5])
def test_labels_of_eight_crowded_variants_do_not_overlap(step: float) -> None:
    crowd = [variant(f"int4-gptq-{i}", 114.0 + i * step, 26.0 + ((5 * i) % 7) * step) for i in range(7)]
    figure = Figure(figsize=(8.5, 5.5), dpi=160, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    charts._draw(figure, canvas, report_of([variant("fp16", 269.1, 22.55), *crowd]))
    canvas.draw()
    axes = figure.axes[0]
    labels = [text for text in axes.texts if "lower left" not in text.get_text()]
    # The words' own box: an annotation's includes its line to the marker.
    extents = [Text.get_window_extent(text, canvas.get_renderer()) for text in labels]
    words = "\n".join(text.get_text() for text in labels).split("\n")
    assert sorted(words) == sorted(["fp16", *(item.name for item in crowd)])
    for index, extent in enumerate(extents):
        assert extent.count_overlaps(extents[:index]) == 0


def test_html_escapes_what_it_is_given() -> None:
    nasty = '<script>alert("1")</script>'
    report = report_of(
        [variant(nasty, command=f"echo '{nasty}' $chart && true", consumer=nasty)],
        model={"name": nasty},
        environment={nasty: nasty},
    )
    page = render_html(report, b"png")
    assert nasty not in page
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;" in page
    assert "$chart &amp;&amp; true" in page


def test_html_is_one_file_with_the_chart_inside() -> None:
    chart = render_chart(report_of(sample()))
    page = render_html(report_of(sample()), chart)
    assert f"data:image/png;base64,{base64.b64encode(chart).decode()}" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)|@import|url\(""", page)
    assert "prefers-color-scheme: dark" in page
    assert page.count('<th scope="col"') == 12
    assert "<caption>" in page


def test_html_tags_are_balanced() -> None:
    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in {"meta", "img"}:
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed(render_html(report_of(sample()), b"png"))
    assert parser.open == []


def test_markdown_cells_cannot_break_the_table() -> None:
    report = report_of([variant("a|b\n*c* <i>", consumer="x | y"), variant("plain", 90.0)])
    lines = render_markdown(report).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [13, 13, 13, 13]
    assert r"a\|b \*c\* \<i\>" in table[2]
    assert "![Artifact size against perplexity](report.png)" in lines


def test_markdown_fences_outlast_the_command() -> None:
    markdown = render_markdown(report_of([variant("int4", command="cat <<'E'\n```\nE")]))
    assert "````sh\ncat <<'E'\n```\nE\n````\n" in markdown


def test_the_table_keeps_every_figure_in_120_columns() -> None:
    text = printed(report_of(sample()), 120)
    assert max(map(len, text.splitlines())) <= 120
    for name, figures in {
        "fp16 *": ["16", "16.00", "269.1", "1.00x", "22.55", "+0.00 %", "0.0212", "93.1 %", "1,234", "312.7"],
        "int4-rtn": ["4", "6.82", "114.6", "2.35x", "31.20", "+38.36 %", "0.0212", "93.1 %", "1,234", "312.7"],
        "int4-gptq *": ["4", "6.82", "114.6", "2.35x", "26.00", "+15.30 %", "0.0212", "93.1 %", "1,234", "312.7"],
    }.items():
        row = next(line for line in text.splitlines() if line.startswith(name + " "))
        assert re.match(rf"{re.escape(name)} +" + " +".join(map(re.escape, figures)) + " ", row), row
    assert "window 1,024; stride 512; bos true" in text
    assert "* Pareto front" in text


@pytest.mark.parametrize("width", [100, 120])
def test_long_words_fold_and_figures_stay(width: int) -> None:
    name = "int4-gptq-group128-actorder-symmetric"
    text = printed(report_of([variant(name, seconds=12_345.6, ppl=123_456.78)]), width)
    for figure in ("114.6", "123,456.78", "12,345.6", "1,234"):
        assert re.search(rf"(?<!\S){re.escape(figure)}(?!\S)", text), text
    assert "…" not in text


def test_the_table_takes_names_literally() -> None:
    assert "[bold]x" in printed(report_of([variant("[bold]x")]))


# Tasks.


def accuracy(value: float, noise: bool | None = None, stderr: float | None = 0.0142) -> dict[str, Any]:
    difference = None if noise is None else {"within_noise": noise, "difference": -0.01}
    return {"metric": "acc", "value": value, "stderr": stderr, "samples": 516, "difference": difference}


def test_a_task_has_a_column_with_its_standard_error() -> None:
    variants = [
        variant("fp16", 269.1, 22.55, tasks={"builtin": accuracy(0.8857), "piqa": accuracy(0.66, stderr=None)}),
        variant("int8", 164.0, 22.6, tasks={"builtin": accuracy(0.884, noise=True)}),
        variant("int4", 114.6, 31.2, tasks={"builtin": accuracy(0.813, noise=False)}),
    ]
    report = build_report(variants, model=MODEL, protocol=PROTOCOL, environment=ENVIRONMENT)
    rows = [line.split(" | ") for line in render_markdown(report).splitlines() if line.startswith("| ")]
    place = rows[0].index("builtin (acc %)")
    assert rows[0][place + 1] == "piqa (acc %)"
    assert [row[place] for row in rows[2:5]] == ["88.6 (1.4)", r"88.4 (1.4) \~", "81.3 (1.4)"]
    assert [row[place + 1] for row in rows[2:5]] == ["66.0", "n/a", "n/a"]
    page = render_html(report, b"")
    assert 'data-value="0.884">88.4 (1.4) ~</td>' in page and page.count("builtin (acc %)") == 1
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render_table(report))
    assert "88.4 (1.4) ~" in console.export_text()


def test_without_tasks_there_is_no_such_column() -> None:
    report = build_report(sample(), model=MODEL, protocol=PROTOCOL, environment=ENVIRONMENT)
    assert "acc" not in render_markdown(report)
    assert all(row["tasks"] == {} for row in report["variants"])
