"""The memory report's command line: its arguments, what fits, and what it prints and writes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from eval.memory import MemoryConfig, available_memory, largest, main, parse, parse_bytes, render, report, show_bytes
from eval.memory_containers import VariantSpec, variants
from eval.memory_predict import Predictor
from quantize.errors import InputError
from quantize.files import read_json


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a config and nothing else."""
    path = tmp_path_factory.mktemp("config-only")
    config = LlamaConfig(
        vocab_size=5000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        dtype="float16",
    )
    config.save_pretrained(path)
    return path


def run(model: Path, *arguments: str) -> dict[str, Any]:
    return report(parse([f"model={model}", *arguments]))


def test_every_variant_has_a_row(model: Path) -> None:
    figures = run(model, "context=512", "batch=2", "memory=1GB")
    rows = {row["variant"]: row for row in figures["variants"]}
    assert list(rows) == [spec.name for spec in variants()]
    assert all(row["fits"] for row in rows.values())
    assert rows["fp32"]["stored_bytes"] == 4 * figures["parameters"] == 2 * rows["fp16"]["stored_bytes"]
    assert rows["int4"]["peak_bytes"] < rows["int8"]["peak_bytes"] < rows["fp16"]["peak_bytes"] < rows["fp32"]["peak_bytes"]
    text = {column.header: list(column.cells) for column in render(figures).columns}
    assert text["variant"] == list(rows)
    assert text["peak"] == [show_bytes(row["peak_bytes"]) for row in rows.values()]
    assert text["fits"] == ["yes"] * len(rows)


def test_what_fits_fits_and_one_more_does_not(model: Path) -> None:
    figures = run(model, "context=256", "batch=3", "memory=30MB", "variants=[fp16,int4]")
    predictor = Predictor(LlamaConfig.from_pretrained(model))
    for row, spec in zip(figures["variants"], (VariantSpec("fp16", dtype="float16"), variants()[5]), strict=True):
        assert spec.name == row["variant"]
        context, batch = row["longest_context"], row["largest_batch"]
        assert 0 < context < 1024
        assert predictor.predict(spec, context, 3).peak_bytes <= 30_000_000 < predictor.predict(spec, context + 1, 3).peak_bytes
        assert batch > 0
        assert predictor.predict(spec, 256, batch).peak_bytes <= 30_000_000 < predictor.predict(spec, 256, batch + 1).peak_bytes
    fp16, int4 = figures["variants"]
    assert int4["longest_context"] > fp16["longest_context"]


def test_where_nothing_fits_zero_does(model: Path) -> None:
    figures = run(model, "memory=1MB", "variants=[fp16]")
    assert figures["variants"][0]["fits"] is False
    assert (figures["variants"][0]["longest_context"], figures["variants"][0]["largest_batch"]) == (0, 0)


def test_the_model_s_own_limit_bounds_the_context(model: Path) -> None:
    figures = run(model, "memory=900GB", "variants=[int4]", "context=2000")
    assert figures["variants"][0]["longest_context"] == 1024
    table = render(figures)
    assert "1,024+" in list(table.columns[-2].cells)
    assert "beyond the 1,024 tokens" in str(table.caption)


@given(threshold=st.integers(0, 5000), limit=st.integers(1, 5000))
def test_the_search_finds_the_last_that_fits(threshold: int, limit: int) -> None:
    asked = []

    def fits(value: int) -> bool:
        asked.append(value)
        return value <= threshold

    assert largest(fits, limit) == min(threshold, limit)
    assert max(asked) <= limit
    assert len(asked) <= 2 * limit.bit_length() + 2


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GB", 16 * 10**9),
        ("16GiB", 2**34),
        ("15.5 gib", 31 * 2**29),
        ("800MB", 8 * 10**8),
        ("1234", 1234),
        ("2T", 2 * 10**12),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "16 apples", "-1GB", "0", "16IB", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="use 16GB"):
        parse_bytes(text)


@given(size=st.integers(0, 10**15))
def test_shown_sizes_are_right_to_three_digits(size: int) -> None:
    number, unit = show_bytes(size).split()
    factor = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
    assert abs(float(number) * factor - size) <= max(0.5, size * 0.0051)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model is not set"),
        (["model"], "'model' is no key=value"),
        (["model=x", "contxt=5"], "contxt.*keys are model, context"),
        (["model=x", "context=many"], "context"),
        (["model=x", "context=0"], "context=0 is below 1; use 4096"),
        (["model=x", "batch=-2"], "batch=-2 is below 1; use 1"),
        (["model=x", "prefill_chunk=0"], "prefill_chunk=0 is below 1"),
        (["model=x", "kv_dtype=int3"], "kv_dtype=int3 is unknown; use one of float32"),
        (["model=x", "dtype=int8"], "dtype=int8 is unknown"),
        (["model=x", "logits=some"], "logits=some is unknown; use one of all, last"),
        (["model=x", "runtime=magic"], "runtime=magic is unknown"),
        (["model=x", "group_size=0"], "group_size=0 is not a group"),
        (["model=x", "variants=[int5]"], "int5 is unknown; use some of fp32"),
    ],
)
def test_impossible_arguments_are_refused_by_name(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(arguments)


def test_defaults_are_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    config = MemoryConfig(model="x")
    for key in vars(config):
        assert f" {key}=" in shown, key
    assert f"context={config.context}" in shown
    assert f"group_size={config.group_size}" in shown


def test_without_memory_it_is_this_machine_s(model: Path) -> None:
    figures = run(model, "variants=[int4]")
    assert figures["memory_bytes"] == available_memory()[0] > 2**20


def test_bad_input_ends_with_2_and_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for wrong in (tmp_path, tmp_path / "nowhere"):
        assert main([f"model={wrong}"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert len(captured.err.splitlines()) == 1
        assert str(wrong) in captured.err


def test_the_command_prints_the_table_and_writes_json(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    output = tmp_path / "memory.json"
    arguments = ["context=64", "memory=20MB", "logits=last", "variants=[fp16,int8,int4]"]
    assert main([f"model={model}", *arguments, f"json={output}"]) == 0
    shown = capsys.readouterr().out
    figures = read_json(output)
    assert figures == json.loads(json.dumps(run(model, *arguments)))
    for row in figures["variants"]:
        line = next(line for line in shown.splitlines() if line.split()[:1] == [row["variant"]])
        assert show_bytes(row["peak_bytes"]) in line
        assert f"{row['longest_context']:,}" in line
