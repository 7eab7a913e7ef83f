"""The bench of the engine on a tiny model: its rows, its page, its files; ratios, goals and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import llamacpp_tools
from inference import bench_kv, bench_serving, bench_table, compile
from inference.bench_cases import Bench, LeftOut, Row, ratios, weight_bytes
from inference.load import load
from quantize.errors import InputError


def test_rows_know_their_goal() -> None:
    row = Row("a", 2, (3.0, 1.0, 2.5), "how")
    assert (row.value, row.reached, row.entry()["value"]) == (2.5, True, 2.5)
    assert bench_table.cells(row) == ["a", ">= 2x", "2.50x", "1.00-3.00", "yes", "how"]
    less = Row("b", 4, (5.0,), "how", at_least=False, unit=" %")
    assert less.reached is False and bench_table.cells(less)[1:5] == ["<= 4 %", "5.00 %", "5.00-5.00", "no"]
    assert Row("c", None, (1.0,), "how").reached is None
    assert ratios([2.0, 3.0], [1.0, 2.0]) == (2.0, 1.5)


def test_turns_alternate() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    found = Bench(Path(), Path(), rounds=3).turns(lambda: measure("a"), lambda: measure("b"))
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == [[1.0, 4.0, 5.0], [2.0, 3.0, 6.0]]


def test_a_page_keeps_what_is_outside_the_markers() -> None:
    section = f"{bench_table.BEGIN}\n\nnew\n\n{bench_table.END}"
    added = bench_table.replace_section("# Page\n", section)
    assert added == f"# Page\n\n{section}\n"
    assert bench_table.replace_section(added.replace("new", "old") + "after\n", section) == added + "after\n"
    with pytest.raises(InputError, match="has one of the markers"):
        bench_table.replace_section(bench_table.END, section)


def test_the_command_measures_writes_and_says_what_is_missing(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_serving, "SHORTEST", 2)
    monkeypatch.setattr(bench_serving, "LONGEST", 12)
    monkeypatch.setattr(bench_kv, "WINDOW", 24)
    monkeypatch.setattr(compile.torch, "compile", lambda function, **options: function)  # test_compile.py compiles
    monkeypatch.setattr(Bench, "ids", lambda self, count, seed=0: [(7 * seed + 3 * i) % 300 for i in range(count)])
    monkeypatch.setenv(llamacpp_tools.VARIABLE, str(tmp_path / "nothing"))
    page = tmp_path / "page.md"
    page.write_text("# Page\n")
    small = ["--rounds", "1", "--prompt", "8", "--tokens", "4", "--requests", "4", "--batch", "2"]
    where = ["--model", str(tiny_llama), "--output", str(tmp_path / "out"), "--page", str(page)]
    assert bench_table.main([*where, *small]) == 0
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    titles = [row["title"] for row in found["rows"]]
    assert len(titles) == 18 and len(found["left_out"]) == 1 and "llama.cpp" in found["left_out"][0]
    assert all(row["value"] > 0 for row in found["rows"])
    text = page.read_text()
    assert all(title in text for title in titles) and "Left out: against llama.cpp" in text
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "paged KV waste" in capsys.readouterr().out
    page.write_text("# Page\n")
    assert bench_table.main([*where, *small, "--only", "static"]) == 0
    assert page.read_text() == "# Page\n"
    assert bench_table.main([*where, "--rounds", "0"]) == 2
    assert "--rounds=0 measures nothing" in capsys.readouterr().err


def test_a_case_that_cannot_be_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(bench: Bench) -> Row:
        raise LeftOut("no such program")

    monkeypatch.setitem(bench_table.CASES, "cache", refuse)
    assert bench_table.measure(Bench(Path(), Path()), ["cache"], print) == ([], ["no such program"])


def test_the_trace_is_the_same_in_every_run_and_smaller_blocks_waste_less(tiny_llama: Path) -> None:
    bench = Bench(tiny_llama, tiny_llama, requests=12, batch=4)
    bench.ids = lambda count, seed=0: [3] * count  # type: ignore[method-assign]
    lengths = [(len(request.prompt), request.max_new_tokens) for request in bench_serving.trace(bench, True)]
    assert lengths == [(len(request.prompt), request.max_new_tokens) for request in bench_serving.trace(bench, True)]
    assert all(16 <= length <= 256 for pair in lengths for length in pair)
    waste = bench_serving.waste_by_block_size(bench)
    assert list(waste.values()) == sorted(waste.values()) and 0 < waste[4] < 0.05
    model = load(tiny_llama)
    assert weight_bytes(model) == model.nbytes() - 2 * model.embedding.numel()
