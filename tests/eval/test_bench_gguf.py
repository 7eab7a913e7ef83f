"""The comparison of GGUF files: rows kept and made again, failures named, tables, and a small run of the real programs."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eval import bench_gguf, bench_gguf_methods
from eval.bench_gguf import evaluation_text, main, measure, parse, prepare, row_key
from eval.bench_gguf_methods import METHODS, Method, Setting, make, missing, sizes_of
from eval.bench_gguf_table import COLUMNS, notes, render_markdown, render_table
from eval.bench_process import Outcome
from eval.consumers import llamacpp
from eval.consumers.llamacpp_output import Perplexity
from eval.llamacpp_tools import TOOLS, VARIABLE, find_tool
from quantize.errors import InputError

BY_NAME = {method.name: method for method in METHODS}
PURE = BY_NAME["q4_0-pure"]


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """A setting with small texts, whose model is never looked at."""
    work = tmp_path / "work"
    work.mkdir()
    for name in ("text.txt", "calibration.txt", "base-f16.gguf"):
        (work / name).write_text(name)
    return Setting(tmp_path / "model", None, work / "text.txt", 4, 32, 2, 64, 60.0, work)


def row(name: str, **changes: Any) -> dict[str, Any]:
    result = {
        "name": name,
        "kind": "Q4_0",
        "pure": False,
        "imatrix": None,
        "recipe": None,
        "settings": [],
        "status": "done",
        "seconds": 1234.56,
        "size_bytes": 77_600_000,
        "bits_per_weight": 4.5,
        "ppl": 30.0,
        "ppl_error": 1.25,
        "kld": 0.12345,
        "same_top": 0.71,
        "generation_speed": 101.26,
    }
    return result | changes


UNQUANTIZED = {key: value for key, value in row("f16", kind=None, ppl=25.0).items() if key not in ("kld", "same_top")}
ROWS = [
    UNQUANTIZED,
    row("q4_0", imatrix="llama.cpp"),
    row("ours", kind=None, recipe="gguf_q4_0", settings=["solver.bits=4"], pure=False),
    row("broken", pure=True) | {"status": "failed", "outcome": "failed", "last": "llama-quantize died | of it"},
    row("absent", recipe="gguf_q9") | {"status": "missing", "outcome": "no recipe gguf_q9"},
]


def test_the_terminal_table_has_every_figure_in_100_columns() -> None:
    stream = io.StringIO()
    Console(file=stream, width=100, color_system=None).print(render_table(ROWS))
    lines = {line.split()[0]: line.split()[1:] for line in stream.getvalue().splitlines() if line.strip()}
    assert max(map(len, stream.getvalue().splitlines())) <= 100
    assert lines["f16"] == ["77.6", "4.50", "25.000", "±", "1.25", "+0.00", "%", "1,234.6", "101.3"]
    expected = ["77.6", "4.50", "30.000", "±", "1.25", "+20.00", "%", "0.1235", "71.00", "%", "1,234.6", "101.3"]
    assert lines["q4_0"] == expected
    assert lines["broken"] == ["failed"] and lines["absent"] == ["no", "recipe", "gguf_q9"]


def test_markdown_has_the_rows_how_they_were_made_and_what_repeats_them() -> None:
    command = "python -m eval.bench_gguf"
    page = render_markdown(ROWS, command=command, date="2001-02-03", protocol={"window": 1024}, environment={})
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [len(COLUMNS) + 1] * (len(ROWS) + 2)
    assert r"| q4\_0 | 77.6 | 4.50 | 30.000 ± 1.25 | +20.00 % | 0.1235 | 71.00 % | 1,234.6 | 101.3 |" in table
    assert "- window: 1,024" in page and command in page and "2001-02-03" in page
    made = notes(ROWS)
    assert made["f16"] == "the checkpoint, converted"
    assert made["q4_0"] == "llama-quantize Q4_0 with the imatrix of llama-imatrix"
    assert made["ours"] == "python -m quantize recipe=gguf_q4_0 solver.bits=4"
    assert made["broken"] == "llama-quantize --pure Q4_0; llama-quantize died | of it"


def test_a_finished_row_is_kept_until_something_changes(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def fake_make(method: Method, setting: Setting) -> tuple[Path, float]:
        made.append(method.name)
        return setting.base, 1.5

    monkeypatch.setattr(bench_gguf, "make", fake_make)
    monkeypatch.setattr(bench_gguf, "figures", lambda *_: {"ppl": 12.5})
    key = row_key(PURE, setting, "base")
    first = measure(PURE, setting, key, fresh=False)
    assert first["status"] == "done" and first["ppl"] == 12.5 and first["seconds"] == 1.5
    assert measure(PURE, setting, key, fresh=False) == json.loads(json.dumps(first)) and made == ["q4_0-pure"]
    measure(PURE, setting, key, fresh=True)
    assert len(made) == 2
    keys = {key, row_key(PURE, setting, "other"), row_key(PURE, replace(setting, chunks=3), "base")}
    setting.text.write_text("another text")
    keys |= {row_key(PURE, setting, "base"), row_key(replace(PURE, pure=False), setting, "base")}
    assert len(keys) == 5
    measure(PURE, setting, row_key(PURE, setting, "base"), fresh=False)
    assert len(made) == 3


def test_a_failed_row_says_why_and_is_tried_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> float:
        raise InputError("llama-quantize failed (exit code 1); its last lines: unknown type")

    monkeypatch.setattr(llamacpp, "quantize", fail)
    found = measure(PURE, setting, "key", fresh=False)
    assert found["status"] == "failed" and found["last"].endswith("unknown type")
    monkeypatch.setattr(llamacpp, "quantize", lambda *_, **__: 2.0)
    monkeypatch.setattr(bench_gguf, "figures", lambda *_: {"ppl": 12.5})
    assert measure(PURE, setting, "key", fresh=False)["status"] == "done"


def test_a_recipe_that_is_not_there_is_missing(setting: Setting) -> None:
    found = measure(Method("x", recipe="gguf_none"), setting, "key", fresh=False)
    assert (found["status"], found["outcome"]) == ("missing", "no recipe gguf_none")
    assert missing(Method("x", recipe="gptq")) is None


def test_each_method_asks_llama_quantize_for_its_own(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None, bool]] = []

    def fake(source: Path, target: Path, kind: str, *, imatrix: Path | None, pure: bool, limit: float) -> float:
        assert source == setting.base and limit == setting.limit
        asked.append((kind, imatrix.name if imatrix else None, pure))
        return 2.0

    def fake_imatrix(model: Path, text: Path, target: Path, *, context: int, chunks: int, limit: float) -> float:
        assert (model, text, context, chunks) == (setting.base, setting.calibration_text, 32, 4)
        assert not target.exists()  # made once
        target.write_text("imatrix")
        return 30.0

    monkeypatch.setattr(llamacpp, "quantize", fake)
    monkeypatch.setattr(llamacpp, "importance_matrix", fake_imatrix)
    seconds = [make(BY_NAME[name], setting)[1] for name in ("f16", "q4_0-pure", "q4_0", "q4_0-imatrix", "q4_k_m-imatrix")]
    matrix = "imatrix-llama.cpp.gguf"
    assert asked == [("Q4_0", None, True), ("Q4_0", None, False), ("Q4_0", matrix, False), ("Q4_K_M", matrix, False)]
    assert seconds == [0.0, 2.0, 2.0, 32.0, 32.0]


def test_recipes_run_and_their_file_is_found(setting: Setting, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def fake(command: list[str], **_: Any) -> Outcome:
        seen.append(command)
        directory = setting.work / "runs" / "ours"
        (directory / "variants" / "tried").mkdir(parents=True)
        shutil.copy(tiny_gguf, directory / "variants" / "tried" / "model.gguf")
        (directory / "manifest.json").write_text('{"steps": {"load": {"seconds": 1.0}, "export": {"seconds": 2.5}}}')
        return Outcome(0, 1.0, "")

    monkeypatch.setattr(bench_gguf_methods, "run_limited", fake)
    file, seconds = make(Method("ours", recipe="gguf_q4_0", settings=("solver.x=1",)), setting)
    assert file.name == "model.gguf" and seconds == 3.5
    assert {"quantize", "recipe=gguf_q4_0", "solver.x=1", "calibration=builtin", "calibration.seq_len=32"} <= set(seen[0])
    sizes = sizes_of(file)
    assert sizes["size_bytes"] == tiny_gguf.stat().st_size
    assert 16 < sizes["bits_per_weight"] < 17  # norms are in 32 bits
    (file.parent / "second.gguf").write_bytes(b"")
    monkeypatch.setattr(bench_gguf_methods, "run_limited", lambda *_, **__: Outcome(0, 1.0, ""))
    with pytest.raises(InputError, match="wrote 2"):
        make(Method("ours", recipe="gguf_q4_0"), setting)
    with pytest.raises(InputError, match="no readable GGUF file"):
        sizes_of(file.parent / "second.gguf")


def test_nothing_is_evaluated_on_what_was_calibrated_on(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} of many." for i in range(100)))
    held_out = evaluation_text(str(text), text)
    assert 0 < len(held_out) < len(text.read_text()) / 2
    other = tmp_path / "other.txt"
    other.write_text("x")
    assert evaluation_text(str(text), other) == text.read_text()
    assert "Paragraph 1 of many" not in evaluation_text("builtin", None)
    other.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not UTF-8"):
        evaluation_text(str(other), None)


def test_bad_input_is_refused_before_anything_runs(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["--text", "none.txt"], r"none\.txt does not exist"),
        (["--model", str(tmp_path)], "is no checkpoint directory"),
        (["--model", str(tiny_llama), "--only", "q5"], "--only q5 is unknown"),
    ):
        with pytest.raises(InputError, match=message):
            parse(arguments)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert main(["--model", str(tiny_llama), "--work-dir", str(tmp_path / "work")]) == 2
    assert "run `make llamacpp`" in capsys.readouterr().err


def test_the_base_is_made_once(setting: Setting, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def fake_base(setting: Setting) -> None:
        made.append("base")
        setting.base.write_text("converted")

    def fake_logits(model: Path, text: Path, logits: Path, **_: Any) -> Perplexity:
        made.append("logits")
        logits.write_text("predictions")
        return Perplexity(12.5, 0.5, 2, 62, 1.0)

    monkeypatch.setattr(bench_gguf, "make_base", fake_base)
    monkeypatch.setattr(llamacpp, "save_logits", fake_logits)
    monkeypatch.setattr(bench_gguf.llamacpp_tools, "tool", lambda name: Path(name))
    setting = replace(setting, model=tiny_llama)
    first = prepare(setting, fresh=False)
    assert prepare(setting, fresh=False) == first and made == ["base", "logits"]
    prepare(replace(setting, chunks=5), fresh=False)
    assert made == ["base", "logits", "logits"]
    prepare(setting, fresh=True)
    assert made[3:] == ["base", "logits"]


@pytest.mark.skipif(any(find_tool(name) is None for name in TOOLS), reason="needs llama.cpp's tools: `make llamacpp`")
def test_a_small_run_of_the_real_programs(
    tiny_llama: Path, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_gguf, "make_base", lambda setting: shutil.copy(tiny_gguf, setting.base))
    sizes = ["--num-samples", "3", "--seq-len", "64", "--chunks", "2", "--context", "128"]
    places = ["--work-dir", str(tmp_path / "work"), "--output", str(tmp_path / "page.md")]
    names = ["f16", "q4_0-pure", "q4_0-imatrix", "q4_0-our-imatrix", "q8_0"]
    assert main(["--model", str(tiny_llama), *sizes, *places, "--only", ",".join(names)]) == 0
    rows = [json.loads((tmp_path / "work" / "results" / f"{name}.json").read_text()) for name in names]
    assert [row["status"] for row in rows] == ["done"] * len(names)
    unquantized, pure, theirs, ours, fine = rows
    assert "kld" not in unquantized and 16 < unquantized["bits_per_weight"] < 17
    assert pure["size_bytes"] < fine["size_bytes"] < unquantized["size_bytes"]
    assert 0 <= fine["kld"] < pure["kld"] and theirs["kld"] > 0 and ours["kld"] > 0
    assert all(row["tokens"] == 2 * 63 and row["generation_speed"] > 0 for row in rows)
    page = (tmp_path / "page.md").read_text()
    assert all(f"| {name.replace('_', chr(92) + '_')} |" in page for name in names)
    assert str(tmp_path) not in page
    capsys.readouterr()
    assert main(["--model", str(tiny_llama), *sizes, *places, "--only", "q4_0-pure"]) == 0
    assert "q4_0-pure: kept from an earlier run" in capsys.readouterr().err
